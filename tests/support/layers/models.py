"""A layer of either front end in a model that runs it in several ways: see `TRANSFORMS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

import dora_jax as dora
from tests.support.layers.rows import Row
from tests.support.models import with_values

# How the model runs the layer, under which name the parameters stand; the last two run a stack.
TRANSFORMS = ("plain", "remat", "vmap", "scan")
STACKED = ("vmap", "scan")
COPIES = 2

Tree = dict[str, Any]


class Model(NamedTuple):
    """Pure functions of trees `{transform: {"layer": ...}}`, and of one input for each transform.

    Attributes:
      base: `(params, xs) -> ys`, of the model before `apply_dora`.
      adapt: `(config, params, xs) -> Adapted`; without `params`, of abstract arrays.
      quantize: `(quantization, params, xs) -> params`, with quantised kernels.
    """

    base: Callable[..., Tree]
    adapt: Callable[..., Adapted]
    quantize: Callable[..., Tree]


class Adapted(NamedTuple):
    """A model after `apply_dora`.

    Attributes:
      adapters: as `apply_dora` makes them.
      apply: `(adapters, xs) -> ys`.
      merge: `adapters -> params`.
    """

    adapters: Tree
    apply: Callable[..., Tree]
    merge: Callable[..., Tree]


def model(row: Row, dtype: Any, param_dtype: Any, transforms: tuple[str, ...]) -> Model:
    build = {"linen": _linen_model, "nnx": _nnx_model}[row.front_end]
    return build(row, {"dtype": dtype, "param_dtype": param_dtype}, transforms)


def _linen_model(row: Row, dtypes: Tree, transforms: tuple[str, ...]) -> Model:
    class Once(linen.Module):
        @linen.compact
        def __call__(self, x):
            return row.call(row.make(**dtypes, name="layer"), x)

    class Step(linen.Module):
        @linen.compact
        def __call__(self, carry, x):
            return carry, row.call(row.make(**dtypes, name="layer"), x)

    stacked: Tree = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    runs = {
        "plain": lambda x: Once(name="plain")(x),
        "remat": lambda x: linen.remat(Once)(name="remat")(x),
        "vmap": lambda x: linen.vmap(Once, **stacked)(name="vmap")(x),
        "scan": lambda x: linen.scan(Step, **stacked)(name="scan")((), x)[1],
    }

    class Copies(linen.Module):
        @linen.compact
        def __call__(self, xs):
            return {transform: runs[transform](xs[transform]) for transform in transforms}

    module = Copies()

    def adapt(config, params, xs):
        if params is None:
            params = jax.eval_shape(module.init, jax.random.key(0), xs)["params"]
        adapted, adapters = dora.apply_dora(
            module, config, params=params, rng=jax.random.key(1), inputs=(xs,)
        )
        return Adapted(
            adapters,
            apply=lambda adapters, xs: adapted.apply({"params": params, "dora": adapters}, xs),
            merge=lambda adapters: dora.merge(adapted, params, adapters),
        )

    def base(params, xs):
        return module.apply({"params": params}, xs)

    def quantize(quantization, params, xs):
        return dora.quantize(module, quantization, params=params, inputs=(xs,))

    return Model(base, adapt, quantize)


def _nnx_model(row: Row, dtypes: Tree, transforms: tuple[str, ...]) -> Model:
    class Once(nnx.Module):
        def __init__(self, rngs):
            self.layer = row.make(**dtypes, rngs=rngs)

        def __call__(self, x):
            return row.call(self.layer, x)

    def run(module, x):
        return module(x)

    stack = nnx.split_rngs(splits=COPIES)(nnx.vmap(Once))
    runs = {
        "plain": run,
        "remat": nnx.remat(run),
        "vmap": nnx.vmap(run),
        "scan": nnx.scan(run, in_axes=(0, 0), out_axes=0),
    }

    class Copies(nnx.Module):
        def __init__(self, rngs):
            for transform in transforms:
                make = stack if transform in STACKED else Once
                setattr(self, transform, make(rngs))

        def __call__(self, xs):
            return {t: runs[t](getattr(self, t), xs[t]) for t in transforms}

    def plain(params):
        module = nnx.eval_shape(lambda: Copies(nnx.Rngs(0)))
        if params is not None:
            nnx.update(module, with_values(module, params))
        return module

    def adapt(config, params, xs):
        inputs = (xs,) if row.traced else None
        adapted = dora.apply_dora(plain(params), config, rngs=nnx.Rngs(1), inputs=inputs)

        def load(adapters):
            module = nnx.clone(adapted)
            dora.set_adapters(module, adapters)
            return module

        def merge(adapters):
            return nnx.to_pure_dict(nnx.state(dora.merge(load(adapters)), nnx.Param))

        return Adapted(dora.get_adapters(adapted), lambda adapters, xs: load(adapters)(xs), merge)

    def quantize(quantization, params, xs):
        inputs = (xs,) if row.traced else None
        quantized = dora.quantize(plain(params), quantization, inputs=inputs)
        return nnx.to_pure_dict(nnx.state(quantized, nnx.Param))

    return Model(lambda params, xs: plain(params)(xs), adapt, quantize)
