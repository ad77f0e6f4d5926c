"""The configuration of a BERT or RoBERTa encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.models.activations import ACTIVATIONS
from experiments.models.config_file import SIZES, HuggingFaceConfig, ModelConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PAD_TOKEN_IDS = {"bert": 0, "roberta": 1}  # Hugging Face's defaults, by model type
_SIZES = (*SIZES, "max_position_embeddings", "type_vocab_size")
_DROPOUT_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(HuggingFaceConfig):
    """Sizes and switches of an encoder, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = BertConfig(
        ...     model_type="roberta", type_vocab_size=1, pad_token_id=1, max_position_embeddings=34
        ... )
        >>> config.max_tokens  # RoBERTa's positions start at pad_token_id + 1
        32
        >>> dataclasses.replace(config, num_attention_heads=5)
        Traceback (most recent call last):
        ...
        experiments.models.config_file.ModelConfigError: hidden_size 768 is not a multiple of ...

    Raises:
        ModelConfigError: A field is out of range or not implemented.
    """

    REQUIRED = ("model_type", "hidden_act", *_SIZES)
    MODEL_TYPES = tuple(_PAD_TOKEN_IDS)
    ALSO_READ = ("tie_word_embeddings",)  # of the head, which is not read
    FIXED: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "is_causal": False,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "quantization_config": None,
    }

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
        self._check_choice("model_type", self.MODEL_TYPES)
        self._check_choice("hidden_act", ACTIVATIONS)
        for name in _SIZES:
            self._check_size(name)
        for name in ("layer_norm_eps", "initializer_range"):
            self._check_number(name, least=0)
        for name in _DROPOUT_RATES:
            self._check_number(name)
            if not 0 <= getattr(self, name) < 1:
                raise ModelConfigError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}.")
        lowest = 0 if self.model_type == "roberta" else -1
        if type(self.pad_token_id) is not int or not lowest <= self.pad_token_id < 2**31:
            raise ModelConfigError(f"pad_token_id must be a token, not {self.pad_token_id!r:.200}.")
        self._check_multiple("hidden_size", "num_attention_heads")
        if self.max_tokens < 1:
            raise ModelConfigError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no position after "
                f"RoBERTa's offset pad_token_id + 1 = {self.pad_token_id + 1}."
            )

    @property
    def max_tokens(self) -> int:
        """The length of the longest sequence that has position embeddings, in tokens."""
        offset = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - offset

    @classmethod
    def fields_of(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields in a parsed `config.json`, with the padding token of its type."""
        pad_token_id = _PAD_TOKEN_IDS.get(stored["model_type"], 0)
        return {"pad_token_id": pad_token_id, **super().fields_of(stored)}
