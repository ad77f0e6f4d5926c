"""What is done with an adapted model, behind the same pure functions in both front ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import dora_jax as dora
from tests.support.models import LinenChain, NNXChain, chain_params, inputs, structure, with_values

WIDTH = 16
LAYERS = 3
CHAIN = (24, 40, 17)

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Operations:
    """An adapted model as functions of its parameters and adapters; none is under jit.

    Attributes:
      params, adapters: as the model starts.
      base: `(params, x) -> y`, the model before `apply_dora`.
      apply: `(params, adapters, x) -> y`; it takes precomputed adapters too.
      precompute_scales: `(params, adapters) -> adapters`.
      disabled: `adapters -> adapters`.
      mixed: `(params, stacked, index, x) -> y`.
      merge: `(params, adapters) -> params`.
      summary: `() -> Summary`.
    """

    params: Tree
    adapters: Tree
    base: Callable[..., jax.Array]
    apply: Callable[..., jax.Array]
    precompute_scales: Callable[..., Tree]
    disabled: Callable[..., Tree]
    mixed: Callable[..., jax.Array]
    merge: Callable[..., Tree]
    summary: Callable[[], dora.analysis.Summary]


def chain(front_end: str, config: dora.DoRAConfig, widths=CHAIN, **dtypes: Any) -> Operations:
    """A chain of dense layers `layer_0`, `layer_1`, ..."""
    params = chain_params(widths, dtypes.get("param_dtype", jnp.float32))
    if front_end == "linen":
        return of_linen(LinenChain(widths, **dtypes), params, inputs(1, widths[0]), config)
    return of_nnx(
        lambda rngs: NNXChain(widths, rngs=rngs, **dtypes), params, config, (inputs(1, widths[0]),)
    )


def stack(front_end: str, config: dora.DoRAConfig) -> Operations:
    """Three blocks in a scan; their parameters are stacked in front, under `blocks.up`."""
    rng = np.random.default_rng(0)
    up = {
        "kernel": jnp.asarray(rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 4, jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(LAYERS, WIDTH)), jnp.float32),
    }
    params = {"blocks": {"up": up}}
    if front_end == "linen":
        return of_linen(LinenStack(), params, inputs(1, WIDTH), config)
    return of_nnx(NNXStack, params, config, (inputs(1, WIDTH),))


def of_linen(module: Any, params: Tree, x: jax.Array, config: dora.DoRAConfig) -> Operations:
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(1), inputs=(x,)
    )
    return Operations(
        params,
        adapters,
        base=lambda params, x: module.apply({"params": params}, x),
        apply=lambda params, adapters, x: model.apply({"params": params, "dora": adapters}, x),
        precompute_scales=lambda params, adapters: dora.precompute_scales(model, params, adapters),
        disabled=lambda adapters: dora.disabled_adapters(model, adapters),
        mixed=lambda params, stacked, index, x: dora.apply_mixed(
            model, {"params": params, "dora": stacked}, index, x
        ),
        merge=lambda params, adapters: dora.merge(model, params, adapters),
        summary=lambda: dora.summary(model, params=params, adapters=adapters),
    )


def of_nnx(
    make: Callable[[nnx.Rngs], nnx.Module], params: Tree, config: dora.DoRAConfig, call: Any = None
) -> Operations:
    base = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    nnx.update(base, with_values(base, params))
    adapted = dora.apply_dora(base, config, rngs=nnx.Rngs(1), inputs=call)

    start = dora.get_adapters(adapted)

    def load(params: Tree, adapters: Tree | None, *, model: Any = adapted) -> Any:
        model = nnx.clone(model)
        nnx.update(model, with_values(model, params))
        if adapters is not None:
            if structure(adapters) != structure(start):
                model = dora.precompute_scales(model)
            dora.set_adapters(model, adapters)
        return model

    def mixed(params: Tree, stacked: Tree, index: Any, x: jax.Array) -> jax.Array:
        model = load(params, None)
        model = dora.precompute_scales(model) if structure(stacked) != structure(start) else model
        return dora.apply_mixed(model, stacked, index, x)

    return Operations(
        params,
        start,
        base=lambda params, x: load(params, None, model=base)(x),
        apply=lambda params, adapters, x: load(params, adapters)(x),
        precompute_scales=lambda params, adapters: dora.get_adapters(
            dora.precompute_scales(load(params, adapters))
        ),
        disabled=lambda adapters: dora.disabled_adapters(load(params, adapters)),
        mixed=mixed,
        merge=lambda params, adapters: parameters(dora.merge(load(params, adapters))),
        summary=lambda: dora.summary(adapted),
    )


def parameters(model: nnx.Module) -> Tree:
    """Returns the base parameters of an NNX model."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return jnp.tanh(linen.Dense(WIDTH, name="up")(x)), None


class LinenStack(linen.Module):
    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return scan(name="blocks")(x, None)[0]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.up(x))


class NNXStack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(NNXBlock)(rngs.split(LAYERS))

    def __call__(self, x):
        step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, self.blocks)
