"""A classifier of texts: pooled features of a BERT encoder, and a linear head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import jax.numpy as jnp
from flax import nnx

from experiments.models.bert import BertEncoder, BertLayerFactory

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from experiments.models.inputs import Ids, Mask

Pooling = Literal["mean", "cls"]


def masked_mean(
    hidden: Float[Array, "batch seq hidden"], mask: Mask | None
) -> Float[Array, "batch hidden"]:
    """Returns the mean over the positions where `mask` is not zero, accumulated in float32.

    A row without such positions gives zeros.

    Example:
        >>> print(masked_mean(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]])))
        [[2.]]
    """
    if mask is None:
        return jnp.mean(hidden, axis=1)
    keep = (mask != 0)[..., None]
    total = jnp.sum(hidden, axis=1, where=keep, dtype=jnp.float32)
    count = jnp.maximum(jnp.sum(keep, axis=1), 1)
    return (total / count).astype(hidden.dtype)


class BertClassifier(nnx.Module):
    """An encoder, pooling of its hidden states, dropout, and a linear head named `classifier`.

    The encoder's projections lie under `encoder.`, see `experiments.models.bert`.

    Example:
        >>> from experiments.models.bert import BertConfig
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        >>> @nnx.jit
        ... def make() -> BertClassifier:
        ...     rngs = nnx.Rngs(0)
        ...     return BertClassifier(BertEncoder(config, rngs=rngs), num_classes=3, rngs=rngs)
        >>> model, tokens = make(), jnp.array([[2, 41, 7, 3], [2, 9, 3, 0]])
        >>> model(tokens, attention_mask=(tokens != 0)).shape
        (2, 3)

    Args:
        encoder: The encoder. The head has its dtypes and its `hidden_dropout_prob`.
        num_classes: Number of logits.
        pooling: `"mean"` over the tokens that are not padding, or `"cls"`, the hidden state of the
            first token.
        rngs: Stream `params`, and `dropout` for training.

    Raises:
        ValueError: `pooling` is neither of the two.
    """

    def __init__(
        self, encoder: BertEncoder, num_classes: int, *, pooling: Pooling = "mean", rngs: nnx.Rngs
    ) -> None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {get_args(Pooling)}, not {pooling!r}.")
        make = BertLayerFactory(encoder.config, encoder.dtype, encoder.param_dtype, rngs)
        self.encoder = encoder
        self.pooling = pooling
        self.dropout = make.dropout(encoder.config.hidden_dropout_prob)
        self.classifier = make.linear(encoder.config.hidden_size, num_classes)

    def features(
        self, input_ids: Ids, attention_mask: Mask | None = None, token_type_ids: Ids | None = None
    ) -> Float[Array, "batch hidden"]:
        """Returns the pooled hidden states: the input of the head, before its dropout."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        return hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, attention_mask)

    def __call__(
        self, input_ids: Ids, attention_mask: Mask | None = None, token_type_ids: Ids | None = None
    ) -> Float[Array, "batch classes"]:
        """Returns logits in the compute dtype. The arguments are those of the encoder."""
        features = self.features(input_ids, attention_mask, token_type_ids)
        return self.classifier(self.dropout(features))
