"""Generates text with a decoder of `llama.py`, adapted, with precomputed scales, or merged.

One program is compiled for all batches of one shape: it reads the prompts at once, then takes one
token after the other in a `lax.while_loop`, with the keys and values of earlier tokens kept (see
`kv_cache.py`). An adapted model computes the scales of its layers in every step, unless they are
computed before: give it `dora.precompute_scales(model)` or `dora.merge(model)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.inputs import check_shapes
from experiments.models.kv_cache import empty_cache

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from experiments.models.inputs import Ids, Mask
    from experiments.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Example:
        >>> Sampling(temperature=0.7, top_p=0.9)
        Sampling(temperature=0.7, top_k=None, top_p=0.9)
        >>> Sampling(top_k=0)
        Traceback (most recent call last):
        ...
        ValueError: top_k must be at least 1, got 0

    Attributes:
        temperature: Divides the logits. 0 takes the most likely token.
        top_k: Draws from that many tokens, the most likely ones. None draws from all.
        top_p: Draws from the smallest set of most likely tokens that has this probability (arXiv
            1904.09751), after `top_k`. None draws from all.

    Raises:
        ValueError: A number is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


class Generated(NamedTuple):
    """What was generated.

    Attributes:
        tokens: Token ids; padding after the end of a row.
        lengths: Number of tokens of each row, with the one that ended it.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]


def left_padded(
    prompts: Sequence[Sequence[int]], length: int | None = None, *, pad_id: int = 0
) -> tuple[Ids, Mask]:
    """Returns token ids and mask of prompts of different lengths, padded on the left.

    Args:
        prompts: Token ids.
        length: Tokens of a row. The default is the longest prompt.
        pad_id: The id at padding.

    Raises:
        ValueError: A prompt is longer, or empty.

    Example:
        >>> ids, mask = left_padded([[5, 6, 7], [8]])
        >>> ids.tolist(), mask.tolist()
        ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    """
    length = max(map(len, prompts)) if length is None else length
    ids = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= length:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, not 1 to {length}")
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def generate(
    model: Llama,
    input_ids: Ids,
    attention_mask: Mask | None = None,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    key: Array | None = None,
) -> Generated:
    """Continues every prompt of a batch.

    Args:
        model: A decoder. Its dropout does not act.
        input_ids: The prompts, padded on the left: see `left_padded`.
        attention_mask: Zero at padding. Without it nothing is padding.
        max_new_tokens: The most tokens that a row gets.
        end_ids: Ids that end a row. When all rows have ended, the loop ends too. What follows the
            end of a row is id 0.
        sampling: How a token is drawn.
        key: Of the draws; needed unless the temperature is 0.

    Raises:
        ValueError: The shapes differ, `max_new_tokens` is below 1, the key is missing, or a row is
            padded on the right.

    Example:
        >>> from experiments.models.llama import Llama
        >>> from experiments.models.llama_config import LlamaConfig
        >>> sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8}
        >>> config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> ids, mask = left_padded([[5, 6, 7], [8]])
        >>> generate(model, ids, mask, max_new_tokens=4).tokens.shape
        (2, 4)
    """
    check_shapes(input_ids, attention_mask=attention_mask)
    mask = np.ones(input_ids.shape, bool) if attention_mask is None else attention_mask != 0
    if not np.asarray(mask)[:, -1].all():
        raise ValueError("a prompt ends in padding: pad on the left, see `left_padded`")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if key is None:
        if sampling.temperature:
            raise ValueError("sampling needs a key, such as jax.random.key(0)")
        key = jax.random.key(0)
    graphdef, state = nnx.split(nnx.view(model, deterministic=True, raise_if_not_found=False))
    limits = _Limits(max_new_tokens, tuple(int(i) for i in end_ids))
    return _generate(graphdef, state, (input_ids, mask), key, limits, sampling)


class _Limits(NamedTuple):
    """When a row ends: after so many tokens, or after one of these."""

    new: int
    ends: tuple[int, ...]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _generate(
    graphdef: Any,
    state: Any,
    prompts: tuple[Array, Array],
    key: Array,
    limits: _Limits,
    sampling: Sampling,
) -> Generated:
    (input_ids, mask), new = prompts, limits.new
    model = nnx.merge(graphdef, state, copy=True)
    batch, length = input_ids.shape
    dtype = jax.eval_shape(lambda: model.embed_tokens(input_ids)).dtype
    cache = empty_cache(model.config, batch, length + new, dtype)
    hidden, cache = model.extend(input_ids, cache, mask)
    rows = jnp.zeros((batch,), bool), jnp.zeros((batch,), jnp.int32)
    first = (
        0,
        jnp.zeros((batch, new), jnp.int32),
        model.logits(hidden[:, -1:])[:, 0],
        cache,
        *rows,
    )

    def goes_on(carry: Any) -> Array:
        return (carry[0] < new) & ~jnp.all(carry[4])

    def step(carry: Any) -> Any:
        number, tokens, logits, cache, ended, lengths = carry
        drawn = draw(logits, sampling, jax.random.fold_in(key, number))
        drawn = jnp.where(ended, 0, drawn)
        tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (0, number))
        lengths = lengths + ~ended
        ended = ended | jnp.isin(drawn, jnp.array(limits.ends, jnp.int32))
        model = nnx.merge(graphdef, state, copy=True)
        hidden, cache = model.extend(drawn[:, None], cache)
        return number + 1, tokens, model.logits(hidden)[:, 0], cache, ended, lengths

    _, tokens, _, _, _, lengths = jax.lax.while_loop(goes_on, step, first)
    return Generated(tokens, lengths)


def draw(
    logits: Float[Array, "batch vocab"], sampling: Sampling, key: Array
) -> Int[Array, " batch"]:
    """Returns one token for each row.

    Example:
        >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
        >>> keys = jax.random.split(jax.random.key(0), 200)
        >>> drawn = jax.vmap(lambda key: draw(logits, Sampling(1.0, top_p=0.7), key))(keys)
        >>> sorted(set(drawn.ravel().tolist()))
        [0, 1]
    """
    logits = logits.astype(jnp.float32)
    if not sampling.temperature:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p  # what comes before is not yet enough
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
