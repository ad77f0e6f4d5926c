"""Models with which mistakes are made, and the record of a mistake."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import dora_jax as dora
from dora_jax import DoRAConfig
from tests.support.models import linen_variables, nnx_model

CONFIG = DoRAConfig(rank=2)
X = jnp.ones((2, 6))


class BadInput(NamedTuple):
    """A mistake.

    Attributes:
      what: the mistake, in words.
      how: makes it.
      error: the class of the error, exactly.
      message: a regular expression in it: the layer or field, and the fix.
    """

    what: str
    how: Callable[[], Any]
    error: type[Exception]
    message: str


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return jnp.tanh(linen.Dense(6, name="up")(x)), None


class LinenModel(linen.Module):
    """Two numbered layers, a norm and a head."""

    @linen.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = LinenBlock(name=f"layers_{i}")(x)
        return linen.Dense(3, name="head")(linen.LayerNorm(name="norm")(x))


class LinenStack(linen.Module):
    streams: tuple[str, ...] = ("params", "dropout")

    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs=dict.fromkeys(self.streams, True),
            length=4,
        )
        return scan(name="blocks")(x, None)[0]


class NNXModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Dict(up=nnx.Linear(6, 6, rngs=rngs)) for _ in range(2)])
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer.up(x))
        return self.head(self.norm(x))


class Doubled(nnx.Linear):
    """Uses its kernel in a way that is not known."""

    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs)


class PerCall(nnx.Module):
    """Takes its equation with each call."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((6, 6)))

    def __call__(self, equation, inputs):
        return jnp.einsum(equation, inputs, self.kernel[...])


dora.layers.register_layout(
    PerCall, dora.layers.einsum_layout(lambda layer, call: call.get("equation"))
)


@functools.cache
def params(module: linen.Module = LinenModel()) -> dict[str, Any]:  # noqa: B008
    return linen_variables(module, X)["params"]


def adapt_linen(module: Any = LinenModel(), given: Any = None, **fields: Any) -> Any:  # noqa: B008
    return dora.apply_dora(
        module,
        DoRAConfig(**{"rank": 2, **fields}),
        params=params(module) if given is None else given,
        rng=jax.random.key(1),
        inputs=(X,),
    )


def adapt(model: Any = None, **fields: Any) -> Any:
    model = nnx_model(lambda _: NNXModel()) if model is None else model
    return dora.apply_dora(model, DoRAConfig(**{"rank": 2, **fields}), rngs=nnx.Rngs(1))


@functools.cache
def linen_model() -> Any:
    return adapt_linen()[0]


@functools.cache
def adapters() -> dict[str, Any]:
    return adapt_linen()[1]


def without(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    """Returns nested dicts without the entry at a path."""
    key, *rest = path
    if rest:
        return {**tree, key: without(tree[key], *rest)}
    return {k: v for k, v in tree.items() if k != key}


def narrower() -> dict[str, Any]:
    """Adapters of rank 1."""
    return adapt_linen(rank=1)[1]


def precomputed() -> dict[str, Any]:
    return dora.precompute_scales(linen_model(), params(), adapters())


def exchanged() -> nnx.Module:
    """An adapted model whose head came from elsewhere afterwards."""
    model = adapt()
    model.head.kernel[...] = model.head.kernel[...] + 1.0
    return model


def apply(tree: Any, x: Any = X, **options: Any) -> Any:
    return linen_model().apply({"params": params(), "dora": tree}, x, **options)


def with_dropout_not_passed_on() -> Any:
    module = LinenStack(streams=("params",))
    model, tree = adapt_linen(module, dropout=0.5)
    variables = {"params": params(module), "dora": tree}
    return model.apply(variables, X, rngs={"dropout": jax.random.key(0)})


def mixed(index: Any, *, variables: Any = None) -> Any:
    stacked = dora.adapters.stack_adapters([adapters(), adapters()])
    variables = {"params": params(), "dora": stacked} if variables is None else variables
    return dora.apply_mixed(linen_model(), variables, index, X)


def ambiguous() -> dict[str, Any]:
    """A stack as long as the rank."""
    return {"up": {"lora_a": jnp.ones((2, 6, 2)), "lora_b": jnp.ones((2, 2, 6))}}
