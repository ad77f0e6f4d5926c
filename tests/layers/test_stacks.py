"""Kernels with stack axes: Linen's lifted transforms at any position, experts in NNX."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from tests.support import reference
from tests.support.layers.laws import close
from tests.support.layers.rows import axes
from tests.support.models import draw_parameters, nnx_model, random_adapters, same
from tests.support.quick import quick_jit


class LinenStack(linen.Module):
    """A layer under lifted transforms, the outermost first: `("scan", 1)` stacks at position 1."""

    make: Any
    lifts: tuple[tuple[str, int], ...]

    @linen.compact
    def __call__(self, x):
        if not self.lifts:
            return self.make(name="layer")(x)
        (kind, position), *inner = self.lifts
        lifted: dict[str, Any] = {
            "variable_axes": {"params": position},
            "split_rngs": {"params": True},
        }
        if kind == "vmap":
            return linen.vmap(LinenStack, **lifted)(self.make, tuple(inner), name="inner")(x)
        return linen.scan(_LinenStep, **lifted)(self.make, tuple(inner), name="inner")((), x)[1]


class _LinenStep(LinenStack):
    @linen.compact
    def __call__(self, carry, x):
        return carry, LinenStack(self.make, self.lifts, name="step")(x)


def _innermost(tree: Any) -> Any:
    """Follows the only key of nested dicts."""
    while set(tree) <= {"inner", "step", "layer"}:
        (tree,) = tree.values()
    return tree


DENSE = functools.partial(linen.Dense, 5)
CONV = functools.partial(linen.Conv, 4, (3,), use_bias=False)
# The layer, its inputs in one copy, and the axes of its kernel. XLA for CPU makes one function of a
# loop whose arrays are below 1 kB, and rounds a product in it another way. It would do so with the
# loop of the plain model alone. The inputs are large enough that it does so with neither.
STACKS = {
    "dense": (DENSE, (16, 4), axes("0", "1")),
    "square dense": (functools.partial(linen.Dense, 3), (16, 3), axes("0", "1")),
    "conv": (CONV, (16, 5, 3), axes("01", "2")),
    "general": (
        functools.partial(linen.DenseGeneral, (2, 5), axis=(-2, -1), use_bias=False),
        (16, 3, 4),
        axes("01", "23"),
    ),
}
LIFTS = [
    *[(kind, lift) for kind in STACKS for lift in [(("scan", 1),), (("vmap", -1),)]],
    *[
        ("dense", (("scan", outer), ("vmap", inner)))
        for outer, inner in [(0, 0), (1, 0), (1, 1), (-1, 1)]
    ],
]


@pytest.mark.rows(3)
@pytest.mark.parametrize(("kind", "lifts"), LIFTS, ids=str)
def test_linen_stacks_have_adapters_wherever_the_stack_axes_are(kind, lifts):
    make, shape, call_axes = STACKS[kind]
    sizes = (3, 2)[: len(lifts)]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*sizes, *shape)), jnp.float32)
    module = LinenStack(make, lifts)
    params = draw_parameters(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    settings = dora.DoRAConfig(rank=2, alpha=3.0, target_modules=["layer"])
    model, adapters = dora.apply_dora(
        module, settings, params=params, rng=jax.random.key(1), inputs=(x,)
    )

    @quick_jit
    def apply(params, adapters):
        return model.apply({"params": params, "dora": adapters}, x)

    base = quick_jit(lambda params: module.apply({"params": params}, x))
    assert same(apply(params, adapters), base(params))
    trained = random_adapters(adapters)
    merged = quick_jit(lambda *parts: dora.merge(model, *parts))(params, trained)
    assert close(apply(params, trained), base(merged))
    # The stack axes of an adapter are in the order in which the kernel has them.
    kernel_shape = _innermost(params)["kernel"].shape
    stack = tuple(n for n in kernel_shape if n in sizes) if kind == "dense" else sizes
    adapter = jax.tree.map(
        lambda leaf: leaf if stack == sizes else jnp.swapaxes(leaf, 0, 1), _innermost(trained)
    )
    shapes = call_axes.shapes(
        _one_copy(_innermost(params)["kernel"], lifts, (0,) * len(sizes)).shape, 2
    )
    assert jax.tree.map(jnp.shape, adapter) == {k: sizes + s for k, s in shapes.items()}
    for copy in itertools.product(*map(range, sizes)):
        kernel, found = (
            reference.as_stack_of_matrices(
                _one_copy(_innermost(p)["kernel"], lifts, copy), call_axes
            )[0]
            for p in (params, merged)
        )
        inputs, outputs = kernel.shape
        expected = reference.merged(
            kernel,
            adapter["lora_a"][copy].reshape(inputs, 2),
            adapter["lora_b"][copy].reshape(2, outputs),
            adapter["magnitude"][copy].reshape(outputs),
            1.5,
        )
        assert close(found, expected)


def _one_copy(kernel: jax.Array, lifts: Any, copy: tuple[int, ...]) -> np.ndarray:
    result = np.asarray(kernel)
    for (_, position), index in zip(lifts, copy, strict=True):
        result = np.take(result, index, axis=position)
    return result


def test_gradients_of_a_stack_do_not_depend_on_where_its_axis_is():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    found = []
    for position in (0, 1, 2):
        module = LinenStack(functools.partial(DENSE, use_bias=False), (("scan", position),))
        params = {"inner": {"step": {"layer": {"kernel": jnp.moveaxis(kernel, 0, position)}}}}
        model, adapters = dora.apply_dora(
            module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
        )

        def loss(adapters, model=model, params=params):
            return jnp.sum(model.apply({"params": params, "dora": adapters}, x) ** 2)

        found.append(quick_jit(jax.grad(loss))(random_adapters(adapters)))
    assert close(found[1], found[0])
    assert close(found[2], found[0])


@pytest.mark.full
def test_experts_and_stacks_of_experts_in_nnx():
    def expert(rngs):
        return nnx.Linear(4, 5, rngs=rngs)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def experts(rngs):
        return expert(rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layers(rngs):
        return experts(rngs)

    over_experts = nnx.vmap(lambda layer, x: layer(x))
    over_layers = nnx.scan(over_experts, in_axes=(0, 0), out_axes=0)
    rng = np.random.default_rng(0)
    for make, call, sizes in [(experts, over_experts, (2,)), (layers, over_layers, (3, 2))]:
        x = jnp.asarray(rng.normal(size=(*sizes, 3, 4)), jnp.float32)
        base, run = nnx_model(make), nnx.jit(call)
        adapted = dora.apply_dora(base, dora.DoRAConfig(rank=2, alpha=3.0), rngs=nnx.Rngs(1))
        assert adapted.lora_a.shape == (*sizes, 4, 2)
        assert adapted.lora_b.shape == (*sizes, 2, 5)
        assert adapted.magnitude.shape == (*sizes, 5)
        assert same(run(adapted, x), run(base, x))
        adapter = random_adapters(dora.get_adapters(adapted))
        dora.set_adapters(adapted, adapter)
        merged = dora.merge(adapted)
        assert close(run(adapted, x), run(merged, x))
        expected = reference.merged(base.kernel[...], **adapter, scaling=1.5)
        assert close(merged.kernel[...], expected)
