"""A small NNX training run with dropout, for the tests of its checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dora_jax as dora
from tests.support.models import NNXChain, chain_params, inputs, with_values

CONFIG = dora.DoRAConfig(rank=2, dropout=0.2)
# All layers of one shape, so that one compiled program starts them all.
WIDTHS = (6, 6, 6)
X, Y = inputs(3, 6), inputs(3, 6, seed=3)


def nnx_chain(widths, params):
    """A chain with these parameters; its own are not drawn, which would take a while to compile."""
    base = nnx.eval_shape(lambda: NNXChain(widths, rngs=nnx.Rngs(0)))
    nnx.update(base, with_values(base, params))
    return base


def nnx_run(config=CONFIG, seed=0):
    base = nnx_chain(WIDTHS, chain_params(WIDTHS, seed=seed))
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    return model, nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)


@nnx.jit
def nnx_step(model, optimizer):
    def loss_fn(model):
        return jnp.mean((model(X) - Y) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
    optimizer.update(model, grads)
    return loss


def everything(model, optimizer):
    """Returns all arrays of a run on the host; of random keys their data."""
    return jax.tree.map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        (nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(optimizer))),
    )


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def run_module(name, *args, devices=1, **variables):
    """Runs a module as a program on so many CPU devices; returns its output."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-m", name, *map(str, args)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
