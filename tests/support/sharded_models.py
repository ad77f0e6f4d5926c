"""A small transformer in both front ends, whose kernels are cut on a mesh, and how they are cut.

With explicit axes a layer must be told where its output lies, since the kernel's in axis is cut and
the input's is not: `nnx` layers take `out_sharding` in a call, Linen's in their `dot_general`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

WIDTH, HIDDEN, HEADS, FEATURES = 32, 64, 8, 4
BATCH, TOKENS = 8, 4
DEPTH = 2
ROWS = ("data", "fsdp")  # the axes that cut the batch

# What cuts each kernel of a layer: name, in and out sizes.
KERNELS = {
    "query": P("fsdp", "tensor", None),
    "key": P("fsdp", "tensor", None),
    "value": P("fsdp", "tensor", None),
    "out": P("tensor", None, "fsdp"),
    "up": P("fsdp", "tensor"),
    "down": P("tensor", "fsdp"),
}
# Where the output of each lies.
OUTPUTS = {
    "query": P(ROWS, None, "tensor", None),
    "key": P(ROWS, None, "tensor", None),
    "value": P(ROWS, None, "tensor", None),
    "out": P(ROWS, None, None),
    "up": P(ROWS, None, "tensor"),
    "down": P(ROWS, None, None),
}


def block(x, layer):
    """One layer of a transformer; `layer(name, x)` applies a projection."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    logits = jnp.einsum("bthd,bshd->bhts", layer("query", h), layer("key", h))
    logits = logits / FEATURES + jnp.where(jnp.tri(TOKENS, dtype=bool), 0.0, -1e9)
    attended = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), layer("value", h))
    x = x + layer("out", attended)
    return x + layer("down", jnp.tanh(layer("up", x)))


class NNXBlock(nnx.Module):
    def __init__(self, rngs, explicit):
        self.explicit = explicit
        heads = (HEADS, FEATURES)
        for name in ("query", "key", "value"):
            setattr(self, name, nnx.LinearGeneral(WIDTH, heads, use_bias=False, rngs=rngs))
        self.out = nnx.LinearGeneral(heads, WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        def layer(name, x):
            return getattr(self, name)(x, out_sharding=OUTPUTS[name] if self.explicit else None)

        return block(x, layer)


class NNXTransformer(nnx.Module):
    def __init__(self, rngs, *, scanned, explicit):
        if scanned:
            make = nnx.vmap(lambda rngs: NNXBlock(rngs, explicit))
            self.layers = make(rngs.split(DEPTH))
        else:
            self.layers = nnx.List([NNXBlock(rngs, explicit) for _ in range(DEPTH)])
        self.scanned = scanned

    def __call__(self, x):
        if self.scanned:
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.layers)
        for layer in self.layers:
            x = layer(x)
        return x


class LinenBlock(linen.Module):
    explicit: bool = False

    @linen.compact
    def __call__(self, x, _=None):
        def layer(name, x):
            product = None
            if self.explicit:
                product = functools.partial(jax.lax.dot_general, out_sharding=OUTPUTS[name])
            general = functools.partial(
                linen.DenseGeneral, use_bias=False, dot_general=product, name=name
            )
            dense = functools.partial(linen.Dense, use_bias=False, dot_general=product, name=name)
            made = {"out": lambda: general(WIDTH, axis=(-2, -1))}
            made |= {"up": lambda: dense(HIDDEN), "down": lambda: dense(WIDTH)}
            return made.get(name, lambda: general((HEADS, FEATURES)))()(x)

        return block(x, layer), None


class LinenTransformer(linen.Module):
    explicit: bool = False

    @linen.compact
    def __call__(self, x):
        stack = linen.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=DEPTH,
            metadata_params={linen.meta.PARTITION_NAME: None},
        )
        return stack(self.explicit, name="layers")(x, None)[0]


def kernel_spec(path, ndim):
    """What cuts a parameter of either transformer, by its path; stack axes in front are whole."""
    own = next((KERNELS[name] for name in map(str, path) if name in KERNELS), P())
    return P(*[None] * (ndim - len(own)), *own) if len(own) else P()
