"""The configuration of a BERT or RoBERTa encoder, read from Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Self

from experiments.models.activations import ACTIVATIONS

if TYPE_CHECKING:
    import pathlib

_PAD_TOKEN_IDS = {"bert": 0, "roberta": 1}  # Hugging Face's defaults, by model type
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_REQUIRED = ("model_type", "hidden_act", *_SIZES)
# Switches of a config.json that change the computation, with the only value implemented here.
_FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class BertConfigError(ValueError):
    """A configuration that is incomplete, contradicts itself, or is not implemented here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """What shapes an encoder, under the names of Hugging Face's ``config.json``.

    Example:
        >>> config = BertConfig(
        ...     model_type="roberta",
        ...     vocab_size=100,
        ...     hidden_size=32,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     intermediate_size=64,
        ...     max_position_embeddings=34,
        ...     type_vocab_size=1,
        ...     pad_token_id=1,
        ... )
        >>> config.max_tokens  # RoBERTa's positions start at pad_token_id + 1
        32
        >>> dataclasses.replace(config, num_attention_heads=5)
        Traceback (most recent call last):
        ...
        experiments.models.bert_config.BertConfigError: hidden_size 32 is not a multiple of ...

    Raises:
        BertConfigError: a field is out of range or not implemented.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.model_type not in _PAD_TOKEN_IDS:
            raise BertConfigError(
                f"model_type {self.model_type!r} is not known: use one of {list(_PAD_TOKEN_IDS)}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise BertConfigError(
                f"hidden_act {self.hidden_act!r} is not known: use one of {list(ACTIVATIONS)}."
            )
        for name in _SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise BertConfigError(f"{name} must be a positive integer, not {size!r}.")
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        for name in ("layer_norm_eps", "initializer_range", "pad_token_id", *rates):
            if not isinstance(getattr(self, name), int | float):
                raise BertConfigError(f"{name} must be a number, not {getattr(self, name)!r}.")
        for name in rates:
            if not 0 <= getattr(self, name) < 1:
                raise BertConfigError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise BertConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.max_tokens < 1:
            raise BertConfigError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position after "
                f"RoBERTa's offset pad_token_id + 1 = {self.pad_token_id + 1}."
            )

    @property
    def max_tokens(self) -> int:
        """The longest sequence, in tokens, for which there are position embeddings."""
        offset = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - offset

    @classmethod
    def from_json(cls, path: pathlib.Path) -> Self:
        """Reads a Hugging Face ``config.json``.

        Sizes, ``model_type`` and ``hidden_act`` must be there. The rest falls back on Hugging
        Face's own defaults (older files leave out ``layer_norm_eps``, for example); what does not
        bear on the encoder is passed over.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: there is no such file.
            BertConfigError: the file is not JSON, misses a field, or asks for a variant that is not
                implemented (relative positions, a decoder, another architecture).
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a Hugging Face checkpoint folder holds config.json beside "
                "model.safetensors."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BertConfigError(f"{path} is not valid JSON: {error}. Fetch it again.") from error
        try:
            return cls(**_known_fields(stored, {field.name for field in dataclasses.fields(cls)}))
        except BertConfigError as error:
            raise BertConfigError(f"{path}: {error}") from error


def _known_fields(stored: Any, names: set[str]) -> dict[str, Any]:
    """The entries of a parsed ``config.json`` that :class:`BertConfig` takes, checked."""
    if not isinstance(stored, dict):
        raise BertConfigError("the file must hold one JSON object.")
    missing = [name for name in _REQUIRED if name not in stored]
    if missing:
        raise BertConfigError(
            f"missing {', '.join(missing)}. Add them: nothing else tells what the weights need."
        )
    for name, implemented in _FIXED.items():
        if stored.get(name, implemented) != implemented:
            raise BertConfigError(
                f"{name} is {stored[name]!r}; only {implemented!r} is implemented. "
                "Use another checkpoint."
            )
    fields = {name: value for name, value in stored.items() if name in names and value is not None}
    return {"pad_token_id": _PAD_TOKEN_IDS.get(stored["model_type"], 0), **fields}
