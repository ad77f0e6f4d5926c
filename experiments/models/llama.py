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

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.activations import ACTIVATIONS
from experiments.models.attention import causal_attention
from experiments.models.inputs import check_shapes
from experiments.models.kv_cache import LayerCache
from experiments.models.layers import LayerFactory
from experiments.models.partitioning import constrain
from experiments.models.rotary import rotary_frequencies, rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    from experiments.models.attention import Setting
    from experiments.models.inputs import Ids, Mask
    from experiments.models.kv_cache import Cache
    from experiments.models.llama_config import LlamaConfig
    from experiments.models.rotary import Angles

    Hidden = Float[Array, "batch seq hidden"]


class LlamaLayerFactory(LayerFactory):
    """Makes the layers of one decoder."""

    config: LlamaConfig
    attention: Setting = "auto"

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
        self.attention = make.attention
        into, back = {"axes": ("embed", "heads")}, {"axes": ("heads", "embed")}
        self.q_proj = make.linear(hidden, queries, bias=config.qkv_bias, **into)
        self.k_proj = make.linear(hidden, keys, bias=config.qkv_bias, **into)
        self.v_proj = make.linear(hidden, keys, bias=config.qkv_bias, **into)
        self.o_proj = make.linear(queries, hidden, bias=config.attention_bias, **back)
        if config.qk_norm:
            self.q_norm = make.norm(config.head_size)
            self.k_norm = make.norm(config.head_size)

    def __call__(
        self,
        x_BxTxD: Hidden,
        angles_BxTxF: Angles,
        mask: Mask | None,
        past: LayerCache | None = None,
    ) -> tuple[Hidden, LayerCache | None]:
        """Attends from every position to itself and to earlier ones where `mask` is not zero.

        With a cache, which knows what is padding, earlier ones are also those in the cache. Returns
        it with the positions added.
        """

        def heads(x: Array) -> Array:
            x = x.reshape(*x.shape[:2], -1, self.config.head_size)
            return constrain(x, "batch", "length", "heads", None)

        q_BxTxNxH, k_BxTxKxH = heads(self.q_proj(x_BxTxD)), heads(self.k_proj(x_BxTxD))
        v_BxTxKxH = heads(self.v_proj(x_BxTxD))
        if self.config.qk_norm:
            q_BxTxNxH, k_BxTxKxH = self.q_norm(q_BxTxNxH), self.k_norm(k_BxTxKxH)
        q_BxTxNxH, k_BxTxKxH = (rotate(x, angles_BxTxF) for x in (q_BxTxNxH, k_BxTxKxH))
        window = self.config.sliding_window
        if past is None:
            y_BxTxNxH = causal_attention(
                q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask, window=window, setting=self.attention
            )
        else:
            y_BxTxNxH, past = past.attend(q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, window)
        return self.o_proj(y_BxTxNxH.reshape(*x_BxTxD.shape[:2], -1)), past


class LlamaMLP(nnx.Module):
    """The gated feed-forward network (arXiv 2002.05202)."""

    def __init__(self, make: LlamaLayerFactory) -> None:
        config = make.config
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = make.linear(*sizes, bias=config.mlp_bias, axes=("embed", "mlp"))
        self.up_proj = make.linear(*sizes, bias=config.mlp_bias, axes=("embed", "mlp"))
        self.down_proj = make.linear(*reversed(sizes), bias=config.mlp_bias, axes=("mlp", "embed"))
        self.hidden_act = config.hidden_act

    def __call__(self, x: Hidden) -> Hidden:
        """Transforms every position separately."""
        y = ACTIVATIONS[self.hidden_act](self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(y, "batch", "length", "mlp"))


class LlamaLayer(nnx.Module):
    """One decoder layer: attention and the feed-forward network, each with its residual."""

    def __init__(self, make: LlamaLayerFactory) -> None:
        hidden = make.config.hidden_size
        self.input_layernorm = make.norm(hidden)
        self.self_attn = LlamaAttention(make)
        self.post_attention_layernorm = make.norm(hidden)
        self.mlp = LlamaMLP(make)

    def __call__(
        self, x: Hidden, angles_BxTxF: Angles, mask: Mask | None, past: LayerCache | None = None
    ) -> tuple[Hidden, LayerCache | None]:
        """Transforms hidden states. `mask` is zero at padding. A cache gets the positions too."""
        x = between_layers(x)
        y, past = self.self_attn(self.input_layernorm(x), angles_BxTxF, mask, past)
        x = between_layers(x + y)
        return between_layers(x + self.mlp(self.post_attention_layernorm(x))), past


def between_layers(x: Hidden) -> Hidden:
    """Returns hidden states, with the sharding that they have between the layers."""
    return constrain(x, "batch", "residual_length", "hidden")


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
            them. A policy of `jax.checkpoint` selects the activations to store; `remat.REMAT` has
            some by name.
        attention: The implementation of attention, see `attention.choose`.
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
        attention: Setting = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        def factory(rngs: nnx.Rngs) -> LlamaLayerFactory:
            make = LlamaLayerFactory(config, dtype, param_dtype, rngs)
            make.attention = attention
            return make

        make = factory(rngs)
        self.config = config
        self.scan_layers = scan_layers
        self.remat = remat
        self.embed_tokens = make.embed(config.vocab_size, axes=("vocab", "embed"))
        self.layers: Any
        if scan_layers:
            stack = nnx.vmap(
                lambda rngs: LlamaLayer(factory(rngs)),
                transform_metadata={nnx.PARTITION_NAME: "layers"},
            )
            self.layers = stack(rngs.split(config.num_hidden_layers))
        else:
            self.layers = nnx.List([LlamaLayer(make) for _ in range(config.num_hidden_layers)])
        self.norm = make.norm(config.hidden_size)
        if not config.tie_word_embeddings:
            sizes = config.hidden_size, config.vocab_size
            self.lm_head = make.linear(*sizes, bias=False, axes=("embed", "vocab"))

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
        return self.logits(self.hidden_states(input_ids, attention_mask, position_ids))

    def logits(self, hidden: Hidden) -> Float[Array, "batch seq vocab"]:
        """Returns the logits that follow from `hidden_states` or `extend`."""
        tied = self.config.tie_word_embeddings
        logits = self.embed_tokens.attend(hidden) if tied else self.lm_head(hidden)
        return constrain(logits, "batch", "length", "vocab")

    def hidden_states(
        self, input_ids: Ids, attention_mask: Mask | None = None, position_ids: Ids | None = None
    ) -> Hidden:
        """Returns the inputs of the output projection. Arguments and errors: see `__call__`."""
        check_shapes(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        positions = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        angles_BxTxF = jnp.asarray(positions)[..., None] * rotary_frequencies(self.config)
        x = self.embed_tokens(jnp.asarray(input_ids))
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        return self.norm(self._run_layers(x, angles_BxTxF, mask, None)[0])

    def extend(
        self, input_ids: Ids, cache: Cache, attention_mask: Mask | None = None
    ) -> tuple[Hidden, Cache]:
        """Goes on from the tokens in a cache: `hidden_states` of further tokens, and the cache.

        Args:
            input_ids: The next token ids of each row. The cache must have that many free slots.
            cache: See `kv_cache.empty_cache`.
            attention_mask: Zero at padding, which takes a slot but no position of the text.

        Raises:
            ValueError: The shapes differ.
        """
        check_shapes(input_ids, attention_mask=attention_mask)
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask != 0
        before = jnp.sum(cache.real, axis=1, keepdims=True)
        positions = before + jnp.cumsum(mask, axis=1) - 1
        real = jax.lax.dynamic_update_slice(cache.real, jnp.asarray(mask), (0, cache.used))
        past = LayerCache(cache._replace(real=real), jnp.zeros((), jnp.int32))
        angles_BxTxF = positions[..., None] * rotary_frequencies(self.config)
        x = self.embed_tokens(jnp.asarray(input_ids))
        x, past = self._run_layers(x, angles_BxTxF, None, past)
        return self.norm(x), past.cache._replace(used=cache.used + input_ids.shape[1])

    def _run_layers(self, x: Hidden, angles: Angles, mask: Array | None, past: Any) -> Any:
        def run(carry: Any, layer: LlamaLayer, angles: Angles, mask: Array | None) -> Any:
            x, past = carry
            return layer(x, angles, mask, past)

        if self.remat:
            run = nnx.remat(run, policy=self.remat if callable(self.remat) else None)
        carry = x, past
        if self.scan_layers:
            axes = (nnx.Carry, 0, None, None)
            return nnx.scan(run, in_axes=axes, out_axes=nnx.Carry)(carry, self.layers, angles, mask)
        for layer in self.layers:
            carry = run(carry, layer, angles, mask)
        return carry
