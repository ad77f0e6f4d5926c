"""Keys and values of the tokens that a decoder has seen, so that a new token costs one position.

A cache has a fixed number of slots, so that every step of a generation is one compiled program. All
rows of a batch fill the same slots. So prompts of different lengths are padded on the left, and
padding takes slots that nothing attends to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Bool, Float, Int

    from experiments.models.attention import Keys, Queries
    from experiments.models.llama_config import LlamaConfig


class Cache(NamedTuple):
    """Keys, after their rotation, and values of all layers.

    Attributes:
        keys: Those of the tokens so far; zero in free slots.
        values: Likewise.
        real: Whether a slot holds a token, and not padding.
        used: Slots that are taken. The next token takes slot `used` in every row.
    """

    keys: Float[Array, "layer batch slot key_value_heads features"]
    values: Float[Array, "layer batch slot key_value_heads features"]
    real: Bool[Array, "batch slot"]
    used: Int[Array, ""]

    def take(self, rows: Int[Array, " row"]) -> Cache:
        """Returns a cache whose row `i` is row `rows[i]` of this one.

        With it several continuations of one text share what that text costs.
        """
        keys, values = (jnp.take(x, rows, axis=1) for x in (self.keys, self.values))
        return Cache(keys, values, jnp.take(self.real, rows, axis=0), self.used)


class LayerCache(NamedTuple):
    """The cache as one layer sees it: all of it, and the layer's number.

    The scan over layers carries the whole cache, so that XLA writes into it in place.
    """

    cache: Cache
    layer: Int[Array, ""]

    def attend(
        self, q: Queries, k: Keys, v: Keys, window: int | None
    ) -> tuple[Queries, LayerCache]:
        """Adds new keys and values, and returns the attention of new queries to all so far.

        Args:
            q: Queries of the new tokens, which take the slots from `used` on.
            k: Their keys.
            v: Their values.
            window: Number of slots that each sees, its own included. None means all before it.

        Returns:
            The weighted means of the values, and what the next layer gets. Weights are in float32.
        """
        cache, layer = self
        start = (layer, 0, cache.used, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.keys, k[None].astype(cache.keys.dtype), start)
        values = jax.lax.dynamic_update_slice(
            cache.values, v[None].astype(cache.values.dtype), start
        )
        slot = jnp.arange(keys.shape[2])
        own = cache.used + jnp.arange(q.shape[1])[:, None]
        seen = slot <= own
        if window is not None:
            seen &= slot > own - window
        y = jax.nn.dot_product_attention(
            q,
            keys[layer].astype(q.dtype),
            values[layer].astype(q.dtype),
            mask=(seen & cache.real[:, None])[:, None],
        )
        return y, LayerCache(cache._replace(keys=keys, values=values), layer + 1)


def empty_cache(config: LlamaConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """Returns a cache with free slots alone.

    Example:
        >>> from experiments.models.llama_config import LlamaConfig
        >>> sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
        >>> empty_cache(config, 3, 10, "float32").keys.shape
        (2, 3, 10, 4, 8)
    """
    shape = (config.num_hidden_layers, batch, slots, config.key_value_heads, config.head_size)
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros((batch, slots), bool),
        jnp.zeros((), jnp.int32),
    )
