"""LLaMA-like decoders in Flax NNX: LLaMA 1 to 3, SmolLM2, Mistral, Qwen2 and Qwen3.

One implementation serves all; `LlamaConfig` has the switches that differ. Sources: LLaMA, arXiv
2302.13971; rotary embeddings, arXiv 2104.09864; grouped-query attention, arXiv 2305.13245.

Every projection is a plain `flax.nnx.Linear` with a kernel `(in, out)`, so that adapters can select
it by name. The paths inside `Llama` are those of Hugging Face without `model.`::

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
    lm_head      hidden -> vocab (absent if the embeddings are tied)

With `scan_layers=True` the layers are one module. Its parameters have a leading axis for the layer:
`layers.self_attn.q_proj` has a kernel `(layer, in, out)`, and so on.

Letters in names of arrays: B batch, T position, D hidden features, N heads, K key and value heads,
H features of a head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.activations import ACTIVATIONS
from experiments.models.inputs import check_shapes
from experiments.models.layers import LayerFactory

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    from experiments.models.inputs import Ids, Mask
    from experiments.models.llama_config import LlamaConfig

    Hidden = Float[Array, "batch seq hidden"]
    Angles = Float[Array, "batch_or_1 seq half_features"]


def rotary_frequencies(config: LlamaConfig) -> Float[Array, " half_head"]:
    """Returns the rotation of each pair of a head's features from token to token, in radians.

    It is `theta^(-2i / head_dim)` (arXiv 2104.09864, section 3.2.2), changed by
    `config.rope_scaling`.
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
    # Full turns of each pair within a sequence of the pretraining. A frequency with at most `low`
    # turns is divided, and one with at least `high` turns is kept.
    turns = original * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(
    x_BxTxNxH: Float[Array, "batch seq heads features"], angles_BxTxF: Angles
) -> Float[Array, "batch seq heads features"]:
    """Rotates the pairs (i, i + head_dim / 2) of the features of every head, in float32.

    These are the pairs of Hugging Face's checkpoints. Those of the original LLaMA are (2i, 2i + 1).

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> print(rotate(x, jnp.full((1, 1, 1), jnp.pi / 2)).ravel().round(3))
        [-0.  1.]
    """
    cos, sin = jnp.cos(angles_BxTxF)[:, :, None], jnp.sin(angles_BxTxF)[:, :, None]
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)


class LlamaLayerFactory(LayerFactory):
    """Makes the layers of one decoder."""

    config: LlamaConfig

    def norm(self, features: int) -> nnx.RMSNorm:
        """Returns a normalisation over the last axis."""
        return nnx.RMSNorm(features, epsilon=self.config.rms_norm_eps, **self.common)


class LlamaAttention(nnx.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self, make: LlamaLayerFactory) -> None:
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

    def __call__(self, x_BxTxD: Hidden, angles_BxTxF: Angles, mask: Mask | None) -> Hidden:
        """Attends from every position to itself and to earlier ones where `mask` is not zero."""

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
            implementation=_implementation(q_BxTxNxH.dtype, mask, window),
        )
        return self.o_proj(y_BxTxNxH.reshape(*x_BxTxD.shape[:2], -1))


def _implementation(dtype: DTypeLike, mask: Mask | None, window: int | None) -> Any:
    """Returns cuDNN's flash attention where it can be used: on a GPU, in a narrow dtype, causal."""
    narrow = jnp.dtype(dtype).itemsize == 2
    plain = mask is None and window is None
    return "cudnn" if jax.default_backend() == "gpu" and narrow and plain else None


class LlamaMLP(nnx.Module):
    """The gated feed-forward network (arXiv 2002.05202)."""

    def __init__(self, make: LlamaLayerFactory) -> None:
        config = make.config
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = make.linear(*sizes, bias=config.mlp_bias)
        self.up_proj = make.linear(*sizes, bias=config.mlp_bias)
        self.down_proj = make.linear(*reversed(sizes), bias=config.mlp_bias)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Hidden) -> Hidden:
        """Transforms every position separately."""
        return self.down_proj(ACTIVATIONS[self.hidden_act](self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nnx.Module):
    """One decoder layer: attention and the feed-forward network, each with its residual."""

    def __init__(self, make: LlamaLayerFactory) -> None:
        hidden = make.config.hidden_size
        self.input_layernorm = make.norm(hidden)
        self.self_attn = LlamaAttention(make)
        self.post_attention_layernorm = make.norm(hidden)
        self.mlp = LlamaMLP(make)

    def __call__(self, x: Hidden, angles_BxTxF: Angles, mask: Mask | None) -> Hidden:
        """Transforms hidden states. `mask` is zero at padding."""
        x = x + self.self_attn(self.input_layernorm(x), angles_BxTxF, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """A LLaMA-like decoder with its language modelling head.

    Example:
        >>> from experiments.models.llama_config import LlamaConfig
        >>> sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
        >>> config = LlamaConfig(
        ...     **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ... )
        >>> model = nnx.eval_shape(lambda: Llama(config, scan_layers=True, rngs=nnx.Rngs(0)))
        >>> model.layers.self_attn.k_proj.kernel.shape
        (2, 32, 16)
        >>> nnx.eval_shape(lambda model: model(jnp.array([[2, 41, 7, 3]])), model).shape
        (1, 4, 100)

    Args:
        config: The sizes and switches.
        dtype: Compute dtype, and dtype of the logits. Attention weights, rotary embeddings and the
            statistics of the normalisations are computed in float32.
        param_dtype: Dtype of the stored parameters.
        scan_layers: Whether the layers are stacked and run by a scan. Then one layer is compiled
            instead of all.
        remat: Whether the backward pass recomputes the activations of each layer instead of storing
            them. A policy of `jax.checkpoint` selects the activations to store.
        rngs: Stream `params`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        scan_layers: bool = False,
        remat: bool | Callable[..., bool] = False,
        rngs: nnx.Rngs,
    ) -> None:
        make = LlamaLayerFactory(config, dtype, param_dtype, rngs)
        self.config = config
        self.scan_layers = scan_layers
        self.remat = remat
        self.embed_tokens = make.embed(config.vocab_size)
        self.layers: Any
        if scan_layers:

            def stacked(rngs: nnx.Rngs) -> LlamaLayer:
                return LlamaLayer(LlamaLayerFactory(config, dtype, param_dtype, rngs))

            self.layers = nnx.vmap(stacked)(rngs.split(config.num_hidden_layers))
        else:
            self.layers = nnx.List([LlamaLayer(make) for _ in range(config.num_hidden_layers)])
        self.norm = make.norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = make.linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, input_ids: Ids, attention_mask: Mask | None = None, position_ids: Ids | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """Returns the logits of the token after each position, in `dtype`.

        Args:
            input_ids: Token ids. An id outside the vocabulary gives NaN.
            attention_mask: Zero at padding, on either side. Without it nothing is padding.
            position_ids: The number of each token in its text. The default is 0, 1, 2, and so on.
                Only differences matter.

        Raises:
            ValueError: The shapes differ.
        """
        hidden = self.hidden_states(input_ids, attention_mask, position_ids)
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def hidden_states(
        self, input_ids: Ids, attention_mask: Mask | None = None, position_ids: Ids | None = None
    ) -> Hidden:
        """Returns the inputs of the output projection. Arguments and errors: see `__call__`."""
        check_shapes(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        angles_BxTxF = jnp.asarray(positions)[..., None] * rotary_frequencies(self.config)
        x = self.embed_tokens(jnp.asarray(input_ids))
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        return self.norm(self._run_layers(x, angles_BxTxF, mask))

    def _run_layers(self, x: Hidden, angles: Angles, mask: Array | None) -> Hidden:
        def run(x: Hidden, layer: LlamaLayer, angles: Angles, mask: Array | None) -> Hidden:
            return layer(x, angles, mask)

        if self.remat:
            run = nnx.remat(run, policy=self.remat if callable(self.remat) else None)
        if self.scan_layers:
            axes = (nnx.Carry, 0, None, None)
            return nnx.scan(run, in_axes=axes, out_axes=nnx.Carry)(x, self.layers, angles, mask)
        for layer in self.layers:
            x = run(x, layer, angles, mask)
        return x
