"""LLaMA-like decoders in Flax NNX: LLaMA 1 to 3, SmolLM2, Mistral, Qwen2 and Qwen3.

One implementation serves all: see :class:`~experiments.models.llama_config.LlamaConfig` for what
tells them apart. Sources: LLaMA, arXiv 2302.13971; rotary embeddings, arXiv 2104.09864;
grouped-query attention, arXiv 2305.13245.

Every projection is a plain :class:`flax.nnx.Linear` with a kernel `(in, out)`, so that adapters
select them by name. The paths inside :class:`Llama` are Hugging Face's without `model.`::

    embed_tokens
    layers.{i}.input_layernorm
    layers.{i}.self_attn.q_proj      hidden -> heads * head_dim
    layers.{i}.self_attn.k_proj      hidden -> key_value_heads * head_dim
    layers.{i}.self_attn.v_proj      hidden -> key_value_heads * head_dim
    layers.{i}.self_attn.o_proj      heads * head_dim -> hidden
    layers.{i}.self_attn.q_norm, layers.{i}.self_attn.k_norm      (Qwen3)
    layers.{i}.post_attention_layernorm
    layers.{i}.mlp.gate_proj, layers.{i}.mlp.up_proj      hidden -> intermediate
    layers.{i}.mlp.down_proj      intermediate -> hidden
    norm
    lm_head      hidden -> vocab (absent where the embeddings are tied)

With `scan_layers=True` the layers are one module whose parameters have a leading axis for the
layer: `layers.self_attn.q_proj` with a kernel `(layer, in, out)`, and so on.

Letters in names of arrays: B batch, T position, D hidden features, N heads, K key and value heads,
H features of a head, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.activations import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int, Shaped

    from experiments.models.llama_config import LlamaConfig

    # Batches come from NumPy as well; a mask may be of integers, booleans or floats.
    Ids = Int[Array | np.ndarray, "batch seq"]
    Mask = Shaped[Array | np.ndarray, "batch seq"]

# One initialiser for one scale: jit compiles a model again when its layers hold another function.
_normal = functools.cache(nnx.initializers.normal)


def rotary_frequencies(config: LlamaConfig) -> Float[Array, " half_head"]:
    """The angle, in radians, by which each pair of a head's features turns from token to token.

    `theta^(-2i / head_dim)` (arXiv 2104.09864, section 3.2.2), stretched by `config.rope_scaling`.
    """
    exponents = jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None  # checked by RopeScaling
    # How often a pair turns within a sequence of the pretraining: up to `low` times its frequency
    # is divided, from `high` times on it is left.
    turns = original * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(
    x_BxTxNxH: Float[Array, "batch seq heads features"],
    angles_BxTxF: Float[Array, "batch_or_1 seq half_features"],
) -> Float[Array, "batch seq heads features"]:
    """Turns the pairs (i, i + head_dim / 2) of every head's features, in float32.

    This is the order of Hugging Face's checkpoints; the original LLaMA's pairs are (2i, 2i + 1).

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> print(rotate(x, jnp.full((1, 1, 1), jnp.pi / 2)).ravel().round(3))
        [-0.  1.]
    """
    cos, sin = jnp.cos(angles_BxTxF)[:, :, None], jnp.sin(angles_BxTxF)[:, :, None]
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


class _LayerFactory:
    """Makes the layers of one decoder: its initialisation and dtypes, once."""

    def __init__(
        self, config: LlamaConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

    def linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nnx.Linear:
        init = _normal(self.config.initializer_range)
        return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=init, **self.common)

    def embed(self) -> nnx.Embed:
        config = self.config
        init = _normal(config.initializer_range)
        return nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, **self.common)

    def norm(self, features: int) -> nnx.RMSNorm:
        return nnx.RMSNorm(features, epsilon=self.config.rms_norm_eps, **self.common)


class LlamaAttention(nnx.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self, make: _LayerFactory) -> None:
        config = make.config
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
        keys = config.key_value_heads * config.head_size
        self.config = config
        self.q_proj = make.linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = make.linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = make.linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = make.linear(queries, hidden, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = make.norm(config.head_size)
            self.k_norm = make.norm(config.head_size)

    def __call__(
        self,
        x_BxTxD: Float[Array, "batch seq hidden"],
        angles_BxTxF: Float[Array, "batch_or_1 seq half_features"],
        mask: Mask | None,
    ) -> Float[Array, "batch seq hidden"]:
        """Attends from every position to itself and those before it where `mask` is not zero."""

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], -1, self.config.head_size)

        q_BxTxNxH, k_BxTxKxH = heads(self.q_proj(x_BxTxD)), heads(self.k_proj(x_BxTxD))
        v_BxTxKxH = heads(self.v_proj(x_BxTxD))
        if self.config.qk_norm:
            q_BxTxNxH, k_BxTxKxH = self.q_norm(q_BxTxNxH), self.k_norm(k_BxTxKxH)
        window = self.config.sliding_window
        y_BxTxNxH = jax.nn.dot_product_attention(
            rotate(q_BxTxNxH, angles_BxTxF),
            rotate(k_BxTxKxH, angles_BxTxF),
            v_BxTxKxH,
            mask=None if mask is None else (mask != 0)[:, None, None, :],
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
        return self.o_proj(y_BxTxNxH.reshape(*x_BxTxD.shape[:2], -1))


class LlamaMLP(nnx.Module):
    """The gated feed-forward network (arXiv 2002.05202)."""

    def __init__(self, make: _LayerFactory) -> None:
        config = make.config
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = make.linear(*sizes, bias=config.mlp_bias)
        self.up_proj = make.linear(*sizes, bias=config.mlp_bias)
        self.down_proj = make.linear(*reversed(sizes), bias=config.mlp_bias)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        """Transforms every position by itself."""
        return self.down_proj(ACTIVATIONS[self.hidden_act](self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nnx.Module):
    """One decoder layer: attention, then the feed-forward network, each with its residual."""

    def __init__(self, make: _LayerFactory) -> None:
        hidden = make.config.hidden_size
        self.input_layernorm = make.norm(hidden)
        self.self_attn = LlamaAttention(make)
        self.post_attention_layernorm = make.norm(hidden)
        self.mlp = LlamaMLP(make)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        angles_BxTxF: Float[Array, "batch_or_1 seq half_features"],
        mask: Mask | None,
    ) -> Float[Array, "batch seq hidden"]:
        """Transforms hidden states; `mask` is zero at padding."""
        x = x + self.self_attn(self.input_layernorm(x), angles_BxTxF, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """A LLaMA-like decoder with its language modelling head.

    Example:
        >>> from experiments.models.llama_config import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=100,
        ...     hidden_size=32,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ...     intermediate_size=64,
        ... )
        >>> model = Llama(config, scan_layers=True, rngs=nnx.Rngs(0))
        >>> model.layers.self_attn.k_proj.kernel.shape
        (2, 32, 16)
        >>> model(jnp.array([[2, 41, 7, 3]])).shape
        (1, 4, 100)

    Args:
        config: The shapes.
        scan_layers: Whether the layers are stacked, and run by a scan: one layer is compiled
            instead of all.
        remat: Whether the backward pass computes each layer's activations again instead of keeping
            them; or a policy of `jax.checkpoint` that says which ones to keep.
        dtype: Compute dtype, and that of the logits. Attention weights, rotary embeddings and the
            statistics of the normalisations are computed in float32.
        param_dtype: Dtype in which parameters are stored.
        rngs: Stream `params`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        scan_layers: bool = False,
        remat: bool | Callable[..., bool] = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        make = _LayerFactory(config, dtype, param_dtype, rngs)
        self.config = config
        self.scan_layers = scan_layers
        self.remat = remat
        self.embed_tokens = make.embed()
        self.layers: Any
        if scan_layers:

            def stacked(rngs: nnx.Rngs) -> LlamaLayer:
                return LlamaLayer(_LayerFactory(config, dtype, param_dtype, rngs))

            self.layers = nnx.vmap(stacked)(rngs.split(config.num_hidden_layers))
        else:
            self.layers = nnx.List([LlamaLayer(make) for _ in range(config.num_hidden_layers)])
        self.norm = make.norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = make.linear(config.hidden_size, config.vocab_size)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        position_ids: Ids | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """The logits of the token after each position, in `dtype`.

        Args:
            input_ids: Token ids. One outside the vocabulary gives NaN.
            attention_mask: Zero at padding, on either side; by default nothing is padding.
            position_ids: The number of each token in its text; by default 0, 1, 2, ... Only
                differences matter.

        Raises:
            ValueError: The arrays' shapes differ.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def hidden_states(
        self,
        input_ids: Ids,
        attention_mask: Mask | None = None,
        position_ids: Ids | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        """What the output projection sees. Arguments and errors are those of calling the model."""
        _check_shapes(input_ids, attention_mask, position_ids)
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        angles_BxTxF = jnp.asarray(positions)[..., None] * rotary_frequencies(self.config)
        x = self.embed_tokens(jnp.asarray(input_ids))
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        return self.norm(self._run_layers(x, angles_BxTxF, mask))

    def _run_layers(self, x: Array, angles: Array, mask: Array | None) -> Array:
        def run(x: Array, layer: LlamaLayer, angles: Array, mask: Array | None) -> Array:
            return layer(x, angles, mask)

        if self.remat:
            run = nnx.remat(run, policy=self.remat if callable(self.remat) else None)
        if self.scan_layers:
            axes = (nnx.Carry, 0, None, None)
            return nnx.scan(run, in_axes=axes, out_axes=nnx.Carry)(x, self.layers, angles, mask)
        for layer in self.layers:
            x = run(x, layer, angles, mask)
        return x


def _check_shapes(input_ids: Any, attention_mask: Any, position_ids: Any) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, seq), not of shape {input_ids.shape}.")
    named = {"attention_mask": attention_mask, "position_ids": position_ids}
    for name, array in named.items():
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; give it input_ids' shape {input_ids.shape}."
            )
