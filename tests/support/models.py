"""One small model in both front ends, each behind the same pure functions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import dora_jax as dora
from tests.support.reference import wide

M = TypeVar("M", bound=nnx.Module)
FRONT_ENDS = ("linen", "nnx")


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A chain of dense layers `layer_0`, `layer_1`, ... and its adapters.

    Attributes:
      base: `(params, x) -> y`, the model before `apply_dora`, under jit.
      apply: `(params, adapters, x) -> y`, the adapted one, under jit.
      merge: `(params, adapters) -> params`.
    """

    params: dict[str, Any]
    adapters: dict[str, Any]
    base: Callable[..., jax.Array]
    apply: Callable[..., jax.Array]
    merge: Callable[..., dict[str, Any]]


class LinenChain(linen.Module):
    widths: tuple[int, ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths[1:]):
            x = x if i == 0 else jnp.tanh(x)
            x = linen.Dense(
                width, dtype=self.dtype, param_dtype=self.param_dtype, name=f"layer_{i}"
            )(x)
        return x


class NNXChain(nnx.Module):
    def __init__(self, widths, dtype=None, param_dtype=jnp.float32, *, rngs):
        for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
            layer = nnx.Linear(inner, outer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            setattr(self, f"layer_{i}", layer)

    def __call__(self, x):
        for i in itertools.count():
            if not hasattr(self, f"layer_{i}"):
                return x
            x = getattr(self, f"layer_{i}")(x if i == 0 else jnp.tanh(x))


def chain_params(widths, param_dtype=jnp.float32, seed=0) -> dict[str, Any]:
    """Returns parameters of a chain; the biases are not zero."""
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a), param_dtype),
            "bias": jnp.asarray(rng.normal(size=b), param_dtype),
        }
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }


def adapted_chain(
    front_end: str,
    config: dora.DoRAConfig,
    widths: tuple[int, ...] = (24, 40, 17),
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    params: dict[str, Any] | None = None,
) -> Adapted:
    params = chain_params(widths, param_dtype) if params is None else params
    build = {"linen": _linen_chain, "nnx": _nnx_chain}[front_end]
    return build(config, widths, dtype, param_dtype, params)


def random_adapters(adapters, seed=1, spread=0.3):
    """Returns adapters as after long training: no array near where it started."""
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "magnitude":
            (start,) = wide(leaf)
            return jnp.asarray(start * (1 + spread * np.tanh(noise)) + (start == 0), leaf.dtype)
        return jnp.asarray(spread * noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(move, adapters)


def linen_variables(module: linen.Module, *inputs: Any, seed: int = 0) -> dict[str, Any]:
    """Returns variables of a module, drawn in NumPy: nothing is compiled for them.

    Other collections than `params` start as the module's own `init` has them.
    """
    key = jax.random.key(0)
    shapes = dict(jax.eval_shape(module.init, key, *inputs))
    params = draw_parameters(shapes.pop("params"), seed)
    if not shapes:
        return {"params": params}
    return {**jax.jit(module.init)(key, *inputs), "params": params}


def nnx_model(make: Callable[[nnx.Rngs], M], seed: int = 0) -> M:
    """Returns the model that `make` describes, its parameters drawn in NumPy.

    Of a model without statistics of its own. Its streams of random numbers start at one key.
    """
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    nnx.update(model, draw_parameters(nnx.state(model, nnx.Param), seed))
    key = jax.random.key(seed)
    nnx.update(model, jax.tree.map(lambda _: key, nnx.state(model, nnx.RngKey)))
    counts = nnx.state(model, nnx.RngCount)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), counts))
    return model


def draw_parameters(shapes: Any, seed: int = 0) -> Any:
    """Returns normal numbers in place of shapes; matrices keep the size of what they multiply."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        width = leaf.shape[-2] if leaf.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(width), leaf.dtype)

    return jax.tree.map(draw, shapes)


def inputs(batch: int, width: int, dtype=jnp.float32, seed=2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, width)), dtype)


def _linen_chain(config, widths, dtype, param_dtype, params) -> Adapted:
    module = LinenChain(widths, dtype, param_dtype)
    x = jnp.ones((1, widths[0]), dtype or param_dtype)
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(1), inputs=(x,)
    )
    return Adapted(
        params,
        adapters,
        base=jax.jit(lambda params, x: module.apply({"params": params}, x)),
        apply=jax.jit(
            lambda params, adapters, x: model.apply({"params": params, "dora": adapters}, x)
        ),
        merge=lambda params, adapters: dora.merge(model, params, adapters),
    )


def _nnx_chain(config, widths, dtype, param_dtype, params) -> Adapted:
    base = nnx.eval_shape(lambda: NNXChain(widths, dtype, param_dtype, rngs=nnx.Rngs(0)))
    nnx.update(base, with_values(base, params))
    adapted = dora.apply_dora(base, config, rngs=nnx.Rngs(1))

    def load(model, params, adapters=None):
        model = nnx.clone(model)
        nnx.update(model, with_values(model, params))
        if adapters is not None:
            dora.set_adapters(model, adapters)
        return model

    def merge(params, adapters):
        merged = dora.merge(load(adapted, params, adapters))
        return nnx.to_pure_dict(nnx.state(merged, nnx.Param))

    return Adapted(
        params,
        dora.get_adapters(adapted),
        base=jax.jit(lambda params, x: load(base, params)(x)),
        apply=jax.jit(lambda params, adapters, x: load(adapted, params, adapters)(x)),
        merge=merge,
    )


def with_values(model: nnx.Module, params: dict[str, Any]) -> nnx.State:
    """Returns the state of a model's parameters with the values of a pure dictionary."""
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    return state


def structure(tree: Any) -> Any:
    """Returns what `jax.tree.structure` does; type checkers do not know that it can be compared."""
    return jax.tree.structure(tree)


def same(a: Any, b: Any) -> bool:
    """Whether trees are equal in structure, dtypes and values (`==`: no tolerance)."""
    if structure(a) != structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(_numbers(x), _numbers(y)) for x, y in pairs)


def _numbers(x: Any) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)
