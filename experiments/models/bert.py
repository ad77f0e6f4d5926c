"""BERT and RoBERTa encoders in Flax NNX.

One implementation serves both. RoBERTa differs in its position numbers (see `position_ids`), its
single token type and its vocabulary. Sources: BERT, arXiv 1810.04805; RoBERTa, arXiv 1907.11692.

Every projection is a plain `flax.nnx.Linear`, so that adapters can select it by name. The paths
inside `BertEncoder`, for each layer `i`, are::

    layers.{i}.attention.query    hidden -> hidden
    layers.{i}.attention.key      hidden -> hidden
    layers.{i}.attention.value    hidden -> hidden
    layers.{i}.attention.output   hidden -> hidden
    layers.{i}.intermediate       hidden -> intermediate
    layers.{i}.output             intermediate -> hidden

The suffix `output` matches two projections of a layer. `attention.output` matches the first alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.activations import ACTIVATIONS
from experiments.models.bert_config import BertConfig
from experiments.models.inputs import check_shapes
from experiments.models.layers import LayerFactory

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int

    from experiments.models.inputs import Ids, Mask

    Hidden = Float[Array, "batch seq hidden"]


def position_ids(input_ids: Ids, config: BertConfig) -> Int[Array, "batch_or_1 seq"]:
    """Returns the position numbers of the tokens, counted as in pretraining.

    BERT counts all tokens: 0, 1, 2, and so on. RoBERTa skips padding: it counts the other tokens
    from `pad_token_id + 1` and gives padding the number `pad_token_id`.

    Example:
        >>> config = BertConfig(model_type="roberta", pad_token_id=1)
        >>> print(position_ids(jnp.array([[0, 31414, 2, 1, 1]]), config))
        [[2 3 4 1 1]]
    """
    if config.model_type == "roberta":
        real = input_ids != config.pad_token_id
        return jnp.cumsum(real, axis=1) * real + config.pad_token_id
    return jnp.arange(input_ids.shape[1])[None]


class BertLayerFactory(LayerFactory):
    """Makes the layers of one encoder."""

    config: BertConfig

    def layer_norm(self) -> nnx.LayerNorm:
        """Returns a normalisation over the hidden features."""
        # The variance takes two passes: E[x^2] - E[x]^2 loses digits where features are large, and
        # is no faster.
        return nnx.LayerNorm(
            self.config.hidden_size,
            epsilon=self.config.layer_norm_eps,
            use_fast_variance=False,
            **self.common,
        )

    def dropout(self, rate: float) -> nnx.Dropout:
        """Returns a dropout layer, turned off."""
        return nnx.Dropout(rate, deterministic=True, rngs=self.common["rngs"])


class BertEmbeddings(nnx.Module):
    """The sum of word, position and token type embeddings, normalised."""

    def __init__(self, make: BertLayerFactory) -> None:
        config = make.config
        self.config = config
        self.word_embeddings = make.embed(config.vocab_size)
        self.position_embeddings = make.embed(config.max_position_embeddings)
        self.token_type_embeddings = make.embed(config.type_vocab_size)
        self.layer_norm = make.layer_norm()
        self.dropout = make.dropout(config.hidden_dropout_prob)

    def __call__(self, input_ids: Ids, token_type_ids: Ids | None = None) -> Hidden:
        """Embeds token ids. Without `token_type_ids` every token has type 0."""
        types = jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids
        embedded = (
            self.word_embeddings(jnp.asarray(input_ids))
            + self.position_embeddings(position_ids(input_ids, self.config))
            + self.token_type_embeddings(jnp.asarray(types))
        )
        return self.dropout(self.layer_norm(embedded))


class BertAttention(nnx.Module):
    """Multi-head self-attention, its output projection, residual and normalisation."""

    def __init__(self, make: BertLayerFactory) -> None:
        hidden = make.config.hidden_size
        self.num_heads = make.config.num_attention_heads
        self.query = make.linear(hidden, hidden)
        self.key = make.linear(hidden, hidden)
        self.value = make.linear(hidden, hidden)
        self.output = make.linear(hidden, hidden)
        self.layer_norm = make.layer_norm()
        self.weights_dropout = make.dropout(make.config.attention_probs_dropout_prob)
        self.dropout = make.dropout(make.config.hidden_dropout_prob)

    def __call__(self, x: Hidden, mask: Mask) -> Hidden:
        """Attends from every position to the positions where `mask` is not zero."""
        heads_BxTxNxH = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (
            projection(x).reshape(heads_BxTxNxH)
            for projection in (self.query, self.key, self.value)
        )
        # Written out because jax.nn.dot_product_attention has no dropout on the weights. On a CPU
        # both take the same time. Logits and softmax are float32 for every compute dtype.
        logits_BxNxTxS = jnp.einsum(
            "btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32
        ) / math.sqrt(query.shape[-1])
        # A finite number, so that a row of padding alone gives uniform weights and no NaN.
        lowest = jnp.finfo(logits_BxNxTxS.dtype).min
        logits_BxNxTxS = jnp.where(mask[:, None, None, :] != 0, logits_BxNxTxS, lowest)
        weights_BxNxTxS = jax.nn.softmax(logits_BxNxTxS).astype(value.dtype)
        attended = jnp.einsum("bnts,bsnh->btnh", self.weights_dropout(weights_BxNxTxS), value)
        return self.layer_norm(x + self.dropout(self.output(attended.reshape(x.shape))))


class BertLayer(nnx.Module):
    """One encoder layer: attention, then the feed-forward network with its residual."""

    def __init__(self, make: BertLayerFactory) -> None:
        config = make.config
        self.attention = BertAttention(make)
        self.intermediate = make.linear(config.hidden_size, config.intermediate_size)
        self.output = make.linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = make.layer_norm()
        self.dropout = make.dropout(config.hidden_dropout_prob)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Hidden, mask: Mask) -> Hidden:
        """Transforms hidden states. `mask` is zero at padding."""
        x = self.attention(x, mask)
        intermediate = ACTIVATIONS[self.hidden_act](self.intermediate(x))
        return self.layer_norm(x + self.dropout(self.output(intermediate)))


class BertEncoder(nnx.Module):
    """A BERT or RoBERTa encoder without a head.

    Dropout is off at first. `encoder.train()` turns it on and `encoder.eval()` turns it off. The
    rates are those of the configuration.

    Example:
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        >>> encoder = nnx.eval_shape(lambda: BertEncoder(config, rngs=nnx.Rngs(0)))
        >>> encoder.layers[0].attention.query.kernel.shape
        (32, 32)

    Args:
        config: The sizes.
        dtype: Compute dtype of every layer, and dtype of the hidden states. Softmax and the
            statistics of the normalisations are computed in float32 or wider.
        param_dtype: Dtype of the stored parameters.
        rngs: Stream `params`, and `dropout` for training.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        make = BertLayerFactory(config, dtype, param_dtype, rngs)
        self.config = config
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.embeddings = BertEmbeddings(make)
        self.layers = nnx.List([BertLayer(make) for _ in range(config.num_hidden_layers)])

    def __call__(
        self, input_ids: Ids, attention_mask: Mask | None = None, token_type_ids: Ids | None = None
    ) -> Hidden:
        """Returns the hidden states of the last layer, in `dtype`.

        Args:
            input_ids: Token ids. An id outside the vocabulary gives NaN.
            attention_mask: Zero at padding. Without it nothing is padding.
            token_type_ids: Segment of each token. The default is 0.

        Raises:
            ValueError: The shapes differ, or the model has too few positions for the sequence.
        """
        return self.hidden_states(input_ids, attention_mask, token_type_ids)[-1]

    def hidden_states(
        self, input_ids: Ids, attention_mask: Mask | None = None, token_type_ids: Ids | None = None
    ) -> list[Hidden]:
        """Returns the embeddings and the output of every layer: `num_hidden_layers + 1` arrays.

        Arguments and errors are those of `__call__`.
        """
        check_shapes(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        if input_ids.shape[1] > self.config.max_tokens:
            raise ValueError(
                f"{input_ids.shape[1]} tokens, but the model has positions for "
                f"{self.config.max_tokens}: truncate the input."
            )
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape, bool)
        states = [self.embeddings(input_ids, token_type_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask))
        return states
