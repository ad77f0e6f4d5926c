"""BERT and RoBERTa encoders in Flax NNX, and a classifier on top.

One implementation serves both: RoBERTa is BERT with other position numbers
(:func:`position_ids`), one token type and another vocabulary. Sources: BERT, arXiv 1810.04805;
RoBERTa, arXiv 1907.11692.

Every projection is a plain :class:`flax.nnx.Linear`, so that adapters select them by name. Their
paths inside :class:`BertEncoder`, for each layer ``i``::

    layers.{i}.attention.query    hidden -> hidden
    layers.{i}.attention.key      hidden -> hidden
    layers.{i}.attention.value    hidden -> hidden
    layers.{i}.attention.output   hidden -> hidden
    layers.{i}.intermediate       hidden -> intermediate
    layers.{i}.output             intermediate -> hidden

:class:`BertClassifier` holds them under ``encoder.`` and adds ``classifier``. The suffix ``output``
matches both the attention's and the feed-forward's; ``attention.output`` matches the former alone.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.activations import ACTIVATIONS
from experiments.models.bert_config import BertConfig
from experiments.models.bert_config import BertConfigError as BertConfigError

if TYPE_CHECKING:
    import numpy as np
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int, Shaped

    # Batches come from NumPy as well; a mask may be of integers, booleans or floats.
    Ids = Int[Array | np.ndarray, "batch seq"]
    Mask = Shaped[Array | np.ndarray, "batch seq"]

Pooling = Literal["mean", "cls"]


def position_ids(input_ids: Ids, config: BertConfig) -> Int[Array, "batch_or_1 seq"]:
    """Numbers the tokens as the checkpoint's training did.

    BERT counts 0, 1, 2, ... whatever the tokens. RoBERTa counts the tokens that are not padding
    from ``pad_token_id + 1`` on and gives padding the number ``pad_token_id``.

    Example:
        >>> config = BertConfig(model_type="roberta", pad_token_id=1)
        >>> print(position_ids(jnp.array([[0, 31414, 2, 1, 1]]), config))
        [[2 3 4 1 1]]
    """
    if config.model_type == "roberta":
        real = input_ids != config.pad_token_id
        return jnp.cumsum(real, axis=1) * real + config.pad_token_id
    return jnp.arange(input_ids.shape[1])[None]


# One initialiser for one scale: older Flax layers keep theirs, and jit compiles a model again when
# it holds another function.
_normal = functools.cache(nnx.initializers.normal)


class _LayerFactory:
    """Makes the layers of one encoder: its initialisation, dtypes and dropout stream, once."""

    def __init__(
        self, config: BertConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.init = _normal(config.initializer_range)
        self.common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

    def linear(self, in_features: int, out_features: int) -> nnx.Linear:
        return nnx.Linear(in_features, out_features, kernel_init=self.init, **self.common)

    def embed(self, count: int) -> nnx.Embed:
        return nnx.Embed(count, self.config.hidden_size, embedding_init=self.init, **self.common)

    def layer_norm(self) -> nnx.LayerNorm:
        # The two-pass variance: E[x^2] - E[x]^2 cancels where features are large, and is no faster.
        return nnx.LayerNorm(
            self.config.hidden_size,
            epsilon=self.config.layer_norm_eps,
            use_fast_variance=False,
            **self.common,
        )

    def dropout(self, rate: float) -> nnx.Dropout:
        return nnx.Dropout(rate, deterministic=True, rngs=self.common["rngs"])


class BertEmbeddings(nnx.Module):
    """The sum of word, position and token type embeddings, normalised."""

    def __init__(self, make: _LayerFactory) -> None:
        config = make.config
        self.config = config
        self.word_embeddings = make.embed(config.vocab_size)
        self.position_embeddings = make.embed(config.max_position_embeddings)
        self.token_type_embeddings = make.embed(config.type_vocab_size)
        self.layer_norm = make.layer_norm()
        self.dropout = make.dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        input_ids: Ids,
        token_type_ids: Ids | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """Embeds token ids; without token types every token is of type 0."""
        types = jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids
        embedded = (
            self.word_embeddings(jnp.asarray(input_ids))
            + self.position_embeddings(position_ids(input_ids, self.config))
            + self.token_type_embeddings(jnp.asarray(types))
        )
        return self.dropout(self.layer_norm(embedded))


class BertAttention(nnx.Module):
    """Multi-head self-attention, its output projection, residual and normalisation."""

    def __init__(self, make: _LayerFactory) -> None:
        hidden = make.config.hidden_size
        self.num_heads = make.config.num_attention_heads
        self.query = make.linear(hidden, hidden)
        self.key = make.linear(hidden, hidden)
        self.value = make.linear(hidden, hidden)
        self.output = make.linear(hidden, hidden)
        self.layer_norm = make.layer_norm()
        self.weights_dropout = make.dropout(make.config.attention_probs_dropout_prob)
        self.dropout = make.dropout(make.config.hidden_dropout_prob)

    def __call__(
        self, x: Float[Array, "batch seq hidden"], mask: Mask
    ) -> Float[Array, "batch seq hidden"]:
        """Attends from every position to the positions where ``mask`` is not zero."""
        heads_BxTxNxH = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (
            projection(x).reshape(heads_BxTxNxH)
            for projection in (self.query, self.key, self.value)
        )
        # Written out, and not jax.nn.dot_product_attention, for the dropout on the weights; on a
        # CPU both take the same time. Logits and softmax are float32 whatever the compute dtype.
        logits_BxNxTxS = jnp.einsum(
            "btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32
        ) / math.sqrt(query.shape[-1])
        # Finite, so that a row of padding alone gives uniform weights and no NaN.
        lowest = jnp.finfo(logits_BxNxTxS.dtype).min
        logits_BxNxTxS = jnp.where(mask[:, None, None, :] != 0, logits_BxNxTxS, lowest)
        weights_BxNxTxS = jax.nn.softmax(logits_BxNxTxS).astype(value.dtype)
        attended = jnp.einsum("bnts,bsnh->btnh", self.weights_dropout(weights_BxNxTxS), value)
        return self.layer_norm(x + self.dropout(self.output(attended.reshape(x.shape))))


class BertLayer(nnx.Module):
    """One encoder layer: attention, then the feed-forward network with its residual."""

    def __init__(self, make: _LayerFactory) -> None:
        config = make.config
        self.attention = BertAttention(make)
        self.intermediate = make.linear(config.hidden_size, config.intermediate_size)
        self.output = make.linear(config.intermediate_size, config.hidden_size)
        self.layer_norm = make.layer_norm()
        self.dropout = make.dropout(config.hidden_dropout_prob)
        self.hidden_act = config.hidden_act

    def __call__(
        self, x: Float[Array, "batch seq hidden"], mask: Mask
    ) -> Float[Array, "batch seq hidden"]:
        """Transforms hidden states; ``mask`` is zero at padding."""
        x = self.attention(x, mask)
        intermediate = ACTIVATIONS[self.hidden_act](self.intermediate(x))
        return self.layer_norm(x + self.dropout(self.output(intermediate)))


class BertEncoder(nnx.Module):
    """A BERT or RoBERTa encoder without a head.

    Dropout is off when made; ``encoder.train()`` turns it on, ``encoder.eval()`` off again. Rates
    are the configuration's: ``dataclasses.replace(config, hidden_dropout_prob=0.0)`` changes them.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=100,
        ...     hidden_size=32,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     intermediate_size=64,
        ...     max_position_embeddings=16,
        ... )
        >>> encoder = BertEncoder(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[2, 41, 7, 3], [2, 9, 3, 0]])
        >>> encoder(tokens, attention_mask=(tokens != 0)).shape
        (2, 4, 32)
        >>> encoder.layers[0].attention.query.kernel.shape
        (32, 32)

    Args:
        config: the shapes.
        dtype: compute dtype of every layer, and of the hidden states. Softmax, and the statistics
            of the normalisations, are float32 at least.
        param_dtype: dtype in which parameters are stored.
        rngs: streams ``params`` and, for training, ``dropout``.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        make = _LayerFactory(config, dtype, param_dtype, rngs)
        self.config = config
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.embeddings = BertEmbeddings(make)
        self.layers = nnx.List([BertLayer(make) for _ in range(config.num_hidden_layers)])

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """The last layer's hidden states, in ``dtype``.

        Args:
            input_ids: token ids. One outside the vocabulary gives NaN.
            attention_mask: zero at padding; by default nothing is padding.
            token_type_ids: segment of each token; by default 0.

        Raises:
            ValueError: the arrays' shapes differ, or the sequence is longer than the positions.
        """
        return self.hidden_states(input_ids, attention_mask, token_type_ids)[-1]

    def hidden_states(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
    ) -> list[Float[Array, "batch seq hidden"]]:
        """The embeddings and the output of every layer: ``num_hidden_layers + 1`` arrays.

        Arguments and errors are those of calling the encoder.
        """
        self._check(input_ids, attention_mask, token_type_ids)
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape, bool)
        states = [self.embeddings(input_ids, token_type_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask))
        return states

    def _check(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (batch, seq), not of shape {input_ids.shape}.")
        named = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        for name, array in named.items():
            if array is not None and array.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {array.shape}; give it input_ids' shape {input_ids.shape}."
                )
        if input_ids.shape[1] > self.config.max_tokens:
            raise ValueError(
                f"{input_ids.shape[1]} tokens, but the model has positions for "
                f"{self.config.max_tokens}: truncate the input."
            )


def masked_mean(
    hidden: Float[Array, "batch seq hidden"], mask: Mask | None
) -> Float[Array, "batch hidden"]:
    """Means over the positions where ``mask`` is not zero, accumulated in float32.

    A row without such a position gives zeros.

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
    """Pooled features of an encoder, dropout, and a linear head named ``classifier``.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=100,
        ...     hidden_size=32,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=4,
        ...     intermediate_size=64,
        ...     max_position_embeddings=16,
        ... )
        >>> rngs = nnx.Rngs(0)
        >>> model = BertClassifier(BertEncoder(config, rngs=rngs), num_classes=3, rngs=rngs)
        >>> tokens = jnp.array([[2, 41, 7, 3], [2, 9, 3, 0]])
        >>> model(tokens, attention_mask=(tokens != 0)).shape
        (2, 3)

    Args:
        encoder: the encoder; the head takes over its dtypes and its ``hidden_dropout_prob``.
        num_classes: number of logits.
        pooling: ``"mean"`` over the tokens that are not padding, or ``"cls"``, the hidden state of
            the first token.
        rngs: streams ``params`` and, for training, ``dropout``.

    Raises:
        ValueError: ``pooling`` is neither.
    """

    def __init__(
        self,
        encoder: BertEncoder,
        num_classes: int,
        *,
        pooling: Pooling = "mean",
        rngs: nnx.Rngs,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {get_args(Pooling)}, not {pooling!r}.")
        make = _LayerFactory(encoder.config, encoder.dtype, encoder.param_dtype, rngs)
        self.encoder = encoder
        self.pooling = pooling
        self.dropout = make.dropout(encoder.config.hidden_dropout_prob)
        self.classifier = make.linear(encoder.config.hidden_size, num_classes)

    def features(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
    ) -> Float[Array, "batch hidden"]:
        """Pooled hidden states, before the head's dropout: what a probe on a frozen base sees."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        return hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, attention_mask)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        token_type_ids: Ids | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits, in the encoder's compute dtype; arguments as the encoder's."""
        features = self.features(input_ids, attention_mask, token_type_ids)
        return self.classifier(self.dropout(features))
