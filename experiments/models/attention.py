"""Causal attention by the fastest implementation that the platform has.

- `"plain"`: `jax.nn.dot_product_attention`, on every platform. It forms the weights of all pairs of
  positions: 20 GB for 8,192 tokens of LLaMA-7B on a TPU.
- `"cudnn"`: the same function through cuDNN's flash attention, on NVIDIA GPUs.
- `"splash"`: JAX's splash attention, a kernel for TPUs that keeps to blocks (arXiv 2205.14135). It
  runs on a CPU too, interpreted and slowly, for tests.

The platform is that of the mesh in use, so that a program may be compiled for devices that are not
there. The choice is logged once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from experiments.models.partitioning import mesh_in_use, platform_of
from experiments.models.splash import BLOCK, splash_attention

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from experiments.models.inputs import Mask

    Queries = Float[Array, "batch seq heads features"]
    Keys = Float[Array, "batch seq key_value_heads features"]

Kind = Literal["plain", "cudnn", "splash"]
Setting = Literal["auto", "plain", "cudnn", "splash"]

# Below it the weights of all pairs fit, and XLA fuses what is around them. For 2,048 tokens of
# LLaMA-7B a device of v5e:4x4 needs as much memory with either.
LONG = 1024

LOG = logging.getLogger(__name__)
"""Where the choice is logged."""


class AttentionError(ValueError):
    """An implementation of attention was asked for that cannot run here."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What decides which implementation can run.

    Attributes:
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        length: Positions of a sequence.
        features: Features of a head.
        dtype: Dtype of queries, keys and values.
        padded: Whether some positions may be padding.
    """

    platform: str
    length: int
    features: int
    dtype: str
    padded: bool


def obstacle(kind: Kind, case: Case) -> str | None:
    """Returns why an implementation cannot run, or None if it can.

    Example:
        >>> obstacle("cudnn", Case("gpu", 512, 128, "float32", padded=False))
        'it multiplies bfloat16 and float16, not float32'
    """
    if kind == "cudnn":
        if case.platform != "gpu":
            return f"it is for GPUs, not for a {case.platform}"
        if case.dtype not in ("bfloat16", "float16"):
            return f"it multiplies bfloat16 and float16, not {case.dtype}"
        # Heads of up to 256 features need a Hopper. A program may be compiled for another GPU than
        # the one that is here.
        if case.features % 8 or case.features > 128:
            return f"it takes heads of 8, 16, ... 128 features, not {case.features}"
        if case.padded:
            return "it takes no mask of positions without the weights of all pairs"
    if kind == "splash":
        if case.platform == "gpu":
            return "it is for TPUs, not for a gpu"
        if case.length % BLOCK:
            return f"it takes sequences of a multiple of {BLOCK} tokens, not {case.length}"
    return None


def choose(setting: Setting, case: Case) -> Kind:
    """Returns the implementation to use.

    Args:
        setting: One of them, or `"auto"` for the fastest that can run: cuDNN on GPUs, splash on
            TPUs from `LONG` tokens on, otherwise the plain one.
        case: The platform and the sizes.

    Raises:
        AttentionError: The implementation that was asked for cannot run. Says why.

    Example:
        >>> choose("auto", Case("tpu", 8192, 128, "bfloat16", padded=False))
        'splash'
        >>> choose("auto", Case("cpu", 8192, 128, "bfloat16", padded=False))
        'plain'
    """
    if setting != "auto":
        if reason := obstacle(setting, case):
            raise AttentionError(
                f"attention {setting!r}: {reason}. Use attention='auto' or 'plain'."
            )
        return setting
    if case.platform == "gpu" and obstacle("cudnn", case) is None:
        return "cudnn"
    long = case.platform == "tpu" and case.length >= LONG
    return "splash" if long and obstacle("splash", case) is None else "plain"


def causal_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    mask: Mask | None = None,
    window: int | None = None,
    setting: Setting = "auto",
) -> Queries:
    """Returns the weighted means of the values, `(batch, seq, heads, features)`.

    Softmax of `q k / sqrt(features)`, with weights in float32. Each head of keys and values serves
    `heads / key_value_heads` heads of queries that follow each other.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Zero at padding, on either side. What is returned there is of no use.
        window: Number of positions that each sees, itself included. None means all before it.
        setting: See `choose`.

    Raises:
        AttentionError: The implementation that was asked for cannot run.
    """
    platform = platform_of(mesh_in_use())
    case = Case(platform, q.shape[1], q.shape[-1], jnp.dtype(q.dtype).name, mask is not None)
    kind = choose(setting, case)
    _log_once(kind, case)
    if kind == "splash":
        return splash_attention(q, k, v, mask, window, interpret=platform == "cpu")
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if mask is None else (mask != 0)[:, None, None, :],
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if kind == "cudnn" else None,
    )


@functools.cache
def _log_once(kind: Kind, case: Case) -> None:
    others: tuple[Kind, ...] = ("cudnn", "splash")
    passed = {other: obstacle(other, case) for other in others if other != kind}
    reasons = "; ".join(f"{other}: {why}" for other, why in passed.items() if why)
    LOG.info(
        "attention: %s (%s, %d tokens, heads of %d, %s%s)%s",
        kind,
        case.platform,
        case.length,
        case.features,
        case.dtype,
        ", padded" if case.padded else "",
        f"; {reasons}" if reasons else "",
    )
