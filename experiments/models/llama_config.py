"""The configuration of a LLaMA-like decoder.

LLaMA 1 (arXiv 2302.13971), 2 (arXiv 2307.09288) and 3 (arXiv 2407.21783), SmolLM2, Mistral, Qwen2
and Qwen3 differ in a few switches. Variants that are not implemented raise an error that names the
switch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.models.activations import ACTIVATIONS
from experiments.models.config_file import SIZES, HuggingFaceConfig, ModelConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""The values of `model_type` that are implemented."""

_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window")
# The defaults of transformers for fields that are absent from a config.json of that type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
_MISTRAL_SLIDING_WINDOW = 4096  # if the field is absent; null means no window
_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than in pretraining.

    Attributes:
        rope_type: `"linear"` divides every frequency by `factor` (arXiv 2306.15595); `"llama3"`
            divides low frequencies, keeps high ones, and interpolates between them (LLaMA 3.1).
        factor: The divisor.
        low_freq_factor: For `"llama3"`. Frequencies are low if their wavelength is above
            `original_max_position_embeddings / low_freq_factor`.
        high_freq_factor: For `"llama3"`. Frequencies are high if their wavelength is below
            `original_max_position_embeddings / high_freq_factor`.
        original_max_position_embeddings: For `"llama3"`. Tokens in a sequence of the pretraining.

    Raises:
        ModelConfigError: A field is out of range, or the type is not implemented.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ModelConfigError(
                f"rope_type {self.rope_type!r} is not implemented: use a checkpoint with "
                "'default', 'linear' or 'llama3' rotary frequencies."
            )
        needed = ("factor", *(_LLAMA3_FIELDS if self.rope_type == "llama3" else ()))
        for name in needed:
            _check_positive(f"rope_scaling's {name}", getattr(self, name))
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ModelConfigError("rope_scaling's low_freq_factor must not be high_freq_factor.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(HuggingFaceConfig):
    """Sizes and switches of a decoder, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=100,
        ...     hidden_size=32,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     intermediate_size=64,
        ... )
        >>> config.head_size
        8
        >>> dataclasses.replace(config, num_key_value_heads=3)
        Traceback (most recent call last):
        ...
        experiments.models.config_file.ModelConfigError: num_attention_heads 4 is not a multiple...

    Attributes:
        num_key_value_heads: Heads of keys and values. `None` means as many as of queries.
        head_dim: Features of a head. `None` means `hidden_size / num_attention_heads`.
        rope_theta: Base of the wavelengths of the rotary embeddings.
        attention_bias: Whether the attention's projections have biases. In Qwen2 those of queries,
            keys and values always have them.
        sliding_window: Number of positions that a position attends to, itself included. `None`
            means all positions before it.
        tie_word_embeddings: Whether the embedding table is also the output projection.

    Raises:
        ModelConfigError: A field is out of range or not implemented.
    """

    REQUIRED = ("model_type", *SIZES)
    FIXED: ClassVar[Mapping[str, Any]] = {
        "attention_dropout": 0.0,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
    }

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        self._check_choice("model_type", MODEL_TYPES)
        self._check_choice("hidden_act", ACTIVATIONS)
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        for name in (*SIZES, *_OPTIONAL_SIZES):
            if not (name in _OPTIONAL_SIZES and getattr(self, name) is None):
                self._check_size(name)
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise ModelConfigError(f"{name} must be a bool, not {getattr(self, name)!r}.")
        self._check_heads()

    def _check_heads(self) -> None:
        if self.num_key_value_heads is not None:
            self._check_multiple("num_attention_heads", "num_key_value_heads")
        if self.head_dim is None:
            self._check_multiple("hidden_size", "num_attention_heads")
        if self.head_size % 2:
            raise ModelConfigError(
                f"a head has {self.head_size} features, an odd number, but rotary embeddings "
                "rotate pairs. Correct head_dim."
            )

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether the query and the key of every head are normalised."""
        return self.model_type == "qwen3"

    @classmethod
    def fields_of(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields in a parsed `config.json`, with the defaults of its model type."""
        defaults = _DEFAULTS.get(stored["model_type"], {})
        absent = {name: value for name, value in defaults.items() if name not in stored}
        # From transformers 5 on, one object holds the base and the scaling.
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ModelConfigError(f"rope_scaling must be an object, not {rope!r}.")
        given = super().fields_of(stored)
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        return {
            **absent,
            **given,
            "rope_scaling": _rope_scaling(rope, stored),
            "sliding_window": _sliding_window(stored),
        }


def _rope_scaling(rope: Mapping[str, Any], stored: Mapping[str, Any]) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))  # "type" in older files
    if rope_type == "default":
        return None
    fields: dict[str, Any] = {name: rope.get(name) for name in ("factor", *_LLAMA3_FIELDS)}
    if rope_type == "llama3" and fields["original_max_position_embeddings"] is None:
        fields["original_max_position_embeddings"] = stored.get("max_position_embeddings")
    return RopeScaling(rope_type=rope_type, **fields)


def _sliding_window(stored: Mapping[str, Any]) -> int | None:
    """Returns the window of all layers. Raises if only some layers have one."""
    if stored["model_type"] == "llama":
        return None
    if stored["model_type"] == "mistral":
        return stored.get("sliding_window", _MISTRAL_SLIDING_WINDOW)
    if not stored.get("use_sliding_window"):
        return None
    layers = stored["num_hidden_layers"]
    full = min(stored.get("max_window_layers", 28), layers)
    kinds = stored.get("layer_types") or ["full"] * full + ["sliding_attention"] * (layers - full)
    if set(kinds) == {"sliding_attention"}:
        return stored.get("sliding_window", 4096)
    if "sliding_attention" not in kinds:
        return None
    raise ModelConfigError(
        "use_sliding_window gives some layers a window and others none (max_window_layers, "
        "layer_types), which is not implemented. Use another checkpoint."
    )


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelConfigError(f"{name} must be a positive number, not {value!r}.")
