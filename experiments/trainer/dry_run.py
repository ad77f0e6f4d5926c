"""What a training would take, before it starts: bytes and seconds, by shapes and a short trial."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.trainer.flops import flops_per_token

_SIDE = 1024


def training_bytes(model: nnx.Module, trained: Any) -> int:
    """Returns the bytes of all parameters, and of gradients and Adam's two moments of the trained.

    Activations are not counted: they depend on the batch, and on what XLA keeps of them.

    Example:
        >>> model = nnx.Linear(10, 20, use_bias=False, rngs=nnx.Rngs(0))
        >>> training_bytes(model, nnx.Param), training_bytes(model, nnx.BatchStat)
        (3200, 800)
    """
    frozen = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    own = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model, trained)))
    return frozen + 3 * own


def seconds_per_step(model: nnx.Module, trained: Any, tokens: int) -> float:
    """Returns an estimate of a step's seconds: its products, at the speed of one made now.

    The products of a small model run slower than that one, so that it is often half the truth.

    Args:
        model: The model.
        trained: The type of the variables that are trained.
        tokens: In a batch, padding included.
    """
    x = jnp.full((_SIDE, _SIDE), 1 / _SIDE)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(5):
        x = product(x)
    x.block_until_ready()
    speed = 5 * 2 * _SIDE**3 / (time.perf_counter() - start)
    return flops_per_token(model, trained) * tokens / speed
