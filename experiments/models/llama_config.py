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
from experiments.models.rope import RopeScaling, read_rope

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
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Fields that transformers does not read for that type: its layers have fixed biases.
_IGNORED = {
    "llama": (),
    "mistral": ("attention_bias", "mlp_bias"),
    "qwen2": ("attention_bias", "mlp_bias"),
    "qwen3": ("mlp_bias",),
}


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
    MODEL_TYPES = MODEL_TYPES
    ALSO_READ = (
        *("rope_parameters", "original_max_position_embeddings", "is_decoder"),
        *("use_sliding_window", "max_window_layers", "layer_types"),
    )
    FIXED: ClassVar[Mapping[str, Any]] = {
        "is_causal": True,
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
            self._check_number(name, least=0)
        for name in (*SIZES, *_OPTIONAL_SIZES):
            if not (name in _OPTIONAL_SIZES and getattr(self, name) is None):
                self._check_size(name)
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise ModelConfigError(f"{name} must be a bool, not {getattr(self, name)!r:.200}.")
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
        theta, scaling = read_rope(stored)
        given = super().fields_of(stored) | ({} if theta is None else {"rope_theta": theta})
        for name in _IGNORED[stored["model_type"]]:
            given.pop(name, None)
        return {
            **absent,
            **given,
            "rope_scaling": scaling,
            "sliding_window": _sliding_window(stored),
        }


def _sliding_window(stored: Mapping[str, Any]) -> int | None:
    """Returns the window of all layers. Raises if only some layers have one."""
    layers, kind = stored["num_hidden_layers"], stored["model_type"]
    window = None
    if kind == "mistral":
        window = stored.get("sliding_window", _MISTRAL_SLIDING_WINDOW)
    elif kind != "llama" and _switch(stored, "use_sliding_window"):
        window = stored.get("sliding_window", 4096)
    usual = _SLIDING if window is not None else _FULL
    kinds = {usual}
    if type(layers) is not int:
        return window  # refused as a size
    if kind.startswith("qwen") and window is not None:
        full = stored.get("max_window_layers", 28)
        if type(full) is not int:
            raise ModelConfigError(f"max_window_layers must be an integer, not {full!r:.200}.")
        kinds = {_FULL if i < full else _SLIDING for i in (0, layers - 1)}
    if (given := stored.get("layer_types")) is not None:
        if not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
            raise ModelConfigError(f"layer_types must be a list, not {given!r:.200}.")
        if len(given) != layers:
            raise ModelConfigError(
                f"layer_types has {len(given)} entries, num_hidden_layers is {layers}."
            )
        kinds = set(given)
    if kinds == {usual}:
        return window
    if kinds == {_FULL} and kind.startswith("qwen"):
        return None
    raise ModelConfigError(
        f"layers of the kinds {sorted(kinds)} with a sliding_window of {window} (layer_types, "
        "max_window_layers, use_sliding_window) are not implemented. Use another checkpoint."
    )


def _switch(stored: Mapping[str, Any], name: str) -> bool:
    value = stored.get(name) or False
    if not isinstance(value, bool):
        raise ModelConfigError(f"{name} must be a bool, not {value!r:.200}.")
    return value
