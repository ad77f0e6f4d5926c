"""Floating-point operations of a training step, and what devices can do at most."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}
"""Peak FLOP/s of one device in bfloat16, dense, by JAX's `device_kind`.

Sources: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm (a page for each generation),
and NVIDIA's data sheets of the A100, the H100 (SXM), the H200 and the L4.
"""

# Parameters that no activation is multiplied by as a matrix, even where layers are stacked.
_VECTORS = {"bias", "scale", "magnitude"}


def peak_flops(devices: int = 1) -> float | None:
    """Returns the peak FLOP/s of devices like the first one; None if their kind is not known."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else devices * peak


def flops_per_token(model: nnx.Module, trained: Any) -> int:
    """Returns the FLOPs that training on one token needs, counted from shapes.

    It is 4 for each weight of a frozen matrix (2 forward, 2 for the gradient of its input), and 6
    for each weight of a trained one. Vectors, attention between tokens, norms and what a
    rematerialisation computes again are not counted, nor are embeddings that are looked up. For
    full training it is the usual 6 N (arXiv 2001.08361, section 2.1).

    Args:
        model: The model, whose arrays may be abstract.
        trained: The type of the variables that are trained.

    Example:
        >>> from experiments.trainer.methods import METHODS
        >>> model = nnx.Linear(10, 20, use_bias=False, rngs=nnx.Rngs(0))
        >>> flops_per_token(model, nnx.Param), flops_per_token(model, nnx.BatchStat)
        (1200, 800)
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    tables = [
        module.embedding
        for _, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Embed) and not tied
    ]
    total = 0
    for path, variable in nnx.iter_graph(model):
        if not isinstance(variable, nnx.Variable) or path[-1] in _VECTORS:
            continue
        if any(variable is table for table in tables):
            continue
        of_training = isinstance(variable, trained)
        if of_training or isinstance(variable, nnx.Param):
            sizes = [x.size for x in jax.tree.leaves(variable.get_value()) if np.ndim(x) > 1]
            total += (6 if of_training else 4) * sum(sizes)
    return total
