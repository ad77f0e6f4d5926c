"""The configuration of a LLaMA-like decoder, read from Hugging Face's `config.json`.

LLaMA 1 (arXiv 2302.13971), 2 (arXiv 2307.09288) and 3 (arXiv 2407.21783), SmolLM2, Mistral, Qwen2
and Qwen3 differ in a few switches only; what is not implemented is refused by its name.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Self

from experiments.models.activations import ACTIVATIONS

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""The values of `model_type` that are implemented."""

_REQUIRED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# What transformers assumes where a config.json of that type leaves a field out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
_MISTRAL_SLIDING_WINDOW = 4096  # where the field is absent; null means none
# Switches of a config.json that change the computation, with the only value implemented here.
_FIXED = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class LlamaConfigError(ValueError):
    """A configuration that is incomplete, contradicts itself, or is not implemented here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than in pretraining.

    Attributes:
        rope_type: `"linear"` divides every frequency by `factor` (arXiv 2306.15595); `"llama3"`
            divides low ones, leaves high ones, and interpolates between (LLaMA 3.1).
        factor: The divisor.
        low_freq_factor: `"llama3"`: wavelengths above
            `original_max_position_embeddings / low_freq_factor` are low frequencies.
        high_freq_factor: `"llama3"`: those below
            `original_max_position_embeddings / high_freq_factor` are high ones.
        original_max_position_embeddings: `"llama3"`: tokens in a sequence of the pretraining.

    Raises:
        LlamaConfigError: A field is out of range or the type not implemented.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise LlamaConfigError(
                f"rope_type {self.rope_type!r} is not implemented: use a checkpoint with "
                "'default', 'linear' or 'llama3' rotary frequencies."
            )
        needed = ("factor", *(_LLAMA3_FIELDS if self.rope_type == "llama3" else ()))
        for name in needed:
            _check_positive(f"rope_scaling's {name}", getattr(self, name))
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise LlamaConfigError("rope_scaling's low_freq_factor must not be high_freq_factor.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What shapes a decoder, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=100,
        ...     hidden_size=32,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ...     intermediate_size=64,
        ... )
        >>> config.head_size
        8
        >>> dataclasses.replace(config, num_key_value_heads=3)
        Traceback (most recent call last):
        ...
        experiments.models.llama_config.LlamaConfigError: num_attention_heads 4 is not a multiple...

    Attributes:
        num_key_value_heads: Heads of keys and values; `None` for as many as of queries.
        head_dim: Features of a head; `None` for `hidden_size / num_attention_heads`.
        rope_theta: Base of the rotary embeddings' wavelengths.
        attention_bias: Whether the attention's projections have biases; those of queries, keys and
            values have them in Qwen2 anyway.
        sliding_window: How many positions, its own included, a position attends to; `None` for all
            before it.
        tie_word_embeddings: Whether the embedding table is the output projection too.

    Raises:
        LlamaConfigError: A field is out of range or not implemented.
    """

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
        if self.model_type not in MODEL_TYPES:
            raise LlamaConfigError(
                f"model_type {self.model_type!r} is not implemented: use one of {MODEL_TYPES}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise LlamaConfigError(
                f"hidden_act {self.hidden_act!r} is not implemented: use one of "
                f"{list(ACTIVATIONS)}."
            )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            _check_positive(name, getattr(self, name))
        for name in (*_REQUIRED[1:], "num_key_value_heads", "head_dim", "sliding_window"):
            size = getattr(self, name)
            optional = name not in _REQUIRED
            if not (optional and size is None) and (type(size) is not int or size < 1):
                raise LlamaConfigError(f"{name} must be a positive integer, not {size!r}.")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise LlamaConfigError(f"{name} must be a bool, not {getattr(self, name)!r}.")
        self._check_heads()

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.key_value_heads
        if heads % groups:
            raise LlamaConfigError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}."
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise LlamaConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}."
            )
        if self.head_size % 2:
            raise LlamaConfigError(
                f"a head has {self.head_size} features, an odd number: rotary embeddings turn "
                "pairs. Correct head_dim."
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
        """Whether every head's query and key are normalised."""
        return self.model_type == "qwen3"

    @classmethod
    def from_json(cls, path: pathlib.Path) -> Self:
        """Reads a Hugging Face `config.json`.

        Sizes and `model_type` must be there. The rest falls back on Hugging Face's own defaults;
        what does not bear on the decoder is passed over.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            LlamaConfigError: The file is not JSON, misses a field, or asks for a variant that is
                not implemented; names it.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a Hugging Face checkpoint folder holds config.json beside "
                "its weights."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LlamaConfigError(f"{path} is not valid JSON: {error}. Fetch it again.") from error
        try:
            return cls(**_fields(stored, {field.name for field in dataclasses.fields(cls)}))
        except LlamaConfigError as error:
            raise LlamaConfigError(f"{path}: {error}") from error


def _fields(stored: Any, names: set[str]) -> dict[str, Any]:
    """The fields of a :class:`LlamaConfig` in a parsed `config.json`, checked."""
    if not isinstance(stored, dict):
        raise LlamaConfigError("the file must hold one JSON object.")
    if missing := [name for name in _REQUIRED if name not in stored]:
        raise LlamaConfigError(
            f"missing {', '.join(missing)}. Add them: nothing else tells what the weights need."
        )
    for name, implemented in _FIXED.items():
        if stored.get(name) not in (None, implemented):
            raise LlamaConfigError(
                f"{name} is {stored[name]!r}; only {implemented!r} is implemented. "
                "Use another checkpoint."
            )
    given = {name: value for name, value in stored.items() if name in names and value is not None}
    absent = {
        name: value
        for name, value in _DEFAULTS.get(stored["model_type"], {}).items()
        if name not in stored
    }
    # From transformers 5 on both stand in one object.
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise LlamaConfigError(f"rope_scaling must be an object, not {rope!r}.")
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
    """The window of all layers; one that only some layers have is refused."""
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
    raise LlamaConfigError(
        "use_sliding_window gives some layers a window and others none (max_window_layers, "
        "layer_types), which is not implemented. Use another checkpoint."
    )


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise LlamaConfigError(f"{name} must be a positive number, not {value!r}.")
