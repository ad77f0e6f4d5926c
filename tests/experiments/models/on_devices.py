"""Compares attention and a decoder on meshes of four devices with one device.

`python -m tests.experiments.models.on_devices` prints the largest differences as JSON, relative to
the largest entry of each array.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.attention import causal_attention
from experiments.models.llama import Llama
from experiments.trainer.mesh import make_mesh, parse_mesh
from tests.experiments.tiny_models import LLAMA, filled

MESHES = ("fsdp=2,tensor=2", "tensor=4", "data=2,fsdp=2")


def difference(found, expected):
    """The largest difference of two trees, relative to each array of the second."""
    return max(
        float(np.abs(np.asarray(one) - np.asarray(other)).max() / np.abs(np.asarray(other)).max())
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def attention(setting):
    """Gradients of padded attention with 4 heads of queries and 2 of keys."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 128, n, 8)), jnp.float32) for n in (4, 2, 2))
    mask = np.ones((4, 128), np.int32)
    mask[:2, :30] = mask[2:, -50:] = 0

    def loss(q, k, v):
        y = causal_attention(q, k, v, mask=mask, setting=setting)
        return jnp.where(mask[..., None, None] != 0, jnp.sin(y), 0).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)


def decoder(mesh):
    """The loss of a decoder and its gradients, with its parameters as their names say."""
    graphdef, state = nnx.split(filled(lambda: Llama(LLAMA, scan_layers=True, rngs=nnx.Rngs(0))))
    tokens = np.random.default_rng(1).integers(0, LLAMA.vocab_size, (4, 8))
    if mesh is not None:
        state = jax.device_put(state, nnx.get_named_sharding(state, mesh))
        assert not state["layers"]["mlp"]["up_proj"]["kernel"].get_value().is_fully_replicated

    def loss(state):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], 2).mean()

    return jax.jit(jax.value_and_grad(loss))(state)


def main():
    attended, trained = attention("plain"), decoder(None)
    found = {}
    for text in MESHES:
        with jax.set_mesh(mesh := make_mesh(parse_mesh(text))):
            found[f"splash, {text}"] = difference(attention("splash"), attended)
            found[f"decoder, {text}"] = difference(decoder(mesh), trained)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
