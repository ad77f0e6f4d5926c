"""Splash attention, JAX's attention kernel for TPUs, on every device of a mesh."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from experiments.models.partitioning import mesh_in_use, resolve

if TYPE_CHECKING:
    from jaxtyping import Array

BLOCK = 128
"""The kernel transforms sequences in blocks of a multiple of it."""

# A block of queries meets a block of keys in VMEM. Larger ones start fewer programs.
_LARGEST_BLOCK = 512


def splash_attention(
    q: Array, k: Array, v: Array, mask: Any, window: int | None, *, interpret: bool
) -> Array:
    """Returns causal attention. Arguments: see `attention.causal_attention`.

    XLA cannot divide a kernel over devices. So every device runs it on its own part: batches are
    divided by the mesh's axes of "batch", heads by those of "heads".

    Args:
        q: `(batch, seq, heads, features)`.
        k: `(batch, seq, key_value_heads, features)`.
        v: As `k`.
        mask: `(batch, seq)`, zero at padding, or None.
        window: Number of positions that each sees, or None.
        interpret: Whether to run the kernel as plain operations, as a CPU has to.
    """
    real = None if mask is None else jnp.asarray(mask != 0, jnp.int32)
    mesh = mesh_in_use()

    def body(q: Array, k: Array, v: Array, *real: Array) -> Array:
        return _on_one_device(q, k, v, *real, window=window, interpret=interpret)

    masks_given = () if real is None else (real,)
    if mesh is None:
        return body(q, k, v, *masks_given)
    axes = ("batch", None, "heads", None)
    specs = [resolve(axes, mesh, x.shape) for x in (q, k)]
    if specs[0] != specs[1]:  # too few heads of keys to divide: each head of queries gets its own
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    spec, rows = specs[0], PartitionSpec(specs[0][0], None)
    manual = {axis for entry in spec if entry for axis in _as_tuple(entry)}
    if not manual:
        return body(q, k, v, *masks_given)
    run = jax.shard_map(
        body,
        in_specs=(spec, spec, spec, *(rows for _ in masks_given)),
        out_specs=spec,
        axis_names=manual,
        check_vma=False,
    )
    return run(q, k, v, *masks_given)


def _as_tuple(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _on_one_device(
    q: Array,
    k: Array,
    v: Array,
    real: Array | None = None,
    *,
    window: int | None,
    interpret: bool,
) -> Array:
    length, heads, features = q.shape[1:]
    kernel = _kernel(length, heads, window, interpret)
    scaled = q * np.asarray(1 / math.sqrt(features), q.dtype)
    by_head = [jnp.swapaxes(x, 1, 2) for x in (scaled, k, v)]
    if real is None:
        y = jax.vmap(kernel)(*by_head)
    else:  # padding and text are two texts, of which none sees the other
        y = jax.vmap(kernel)(*by_head, kernels.SegmentIds(real, real))
    return jnp.swapaxes(y, 1, 2).astype(q.dtype)


def _block(length: int) -> int:
    return next(size for size in (_LARGEST_BLOCK, 256, BLOCK) if length % size == 0)


def visited_share(length: int, window: int | None) -> float:
    """Returns the share of the blocks of all pairs of positions that the kernel visits.

    It is 1 for a length that the kernel does not take.

    Example:
        >>> visited_share(2048, None)  # 10 of 16 blocks of 512 x 512
        0.625
    """
    if length % BLOCK:
        return 1.0
    starts = np.arange(0, length, block := _block(length))
    queries, keys = starts[:, None], starts[None]
    seen = keys <= queries
    if window is not None:
        seen &= keys + block > queries - window + 1
    return float(seen.mean())


def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Any:
    shape = (length, length)
    seen = (
        masks.CausalMask(shape)
        if window is None
        else masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    )
    block = _block(length)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
