"""Prints how far a start by a function is from NumPy on four devices, and whether it is cut."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dora_jax as dora


def init(path, kernel, rank, key):
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def compare(kind: AxisType) -> tuple[float, bool]:
    """Returns the error of the product, and whether the factors are cut as the kernel is."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        cut = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        base = nnx.Linear(8, 6, kernel_init=cut, rngs=nnx.Rngs(0))
        config = dora.DoRAConfig(rank=2, init=init)
        model = dora.apply_dora(base, config, rngs=nnx.Rngs(1), inputs=(jnp.ones((4, 8)),))
    u, s, vt = np.linalg.svd(np.asarray(model.kernel[...]), full_matrices=False)
    a, b = (np.asarray(x[...], np.float64) for x in (model.lora_a, model.lora_b))
    error = np.abs(a @ b - u[:, :2] * s[:2] @ vt[:2]).max()
    pairs = ((model.lora_a, model.base_init_a), (model.lora_b, model.base_init_b))
    found = [[x[...].sharding.spec for x in pair] for pair in pairs]
    return float(error), found == [[P("fsdp", None)] * 2, [P(None, "tensor")] * 2]


if __name__ == "__main__":
    print(json.dumps({kind.name: compare(kind) for kind in (AxisType.Auto, AxisType.Explicit)}))
