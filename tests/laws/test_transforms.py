"""Adapted models under JAX's and Flax's transformations: each gives the untransformed result."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from tests.support import reference
from tests.support.models import (
    FRONT_ENDS,
    NNXChain,
    inputs,
    linen_variables,
    nnx_model,
    random_adapters,
    same,
)
from tests.support.operations import CHAIN, WIDTH, chain, of_linen, of_nnx, parameters, stack
from tests.support.quick import quick_jit

CONFIG = dora.DoRAConfig(rank=4)
BATCH = 6

# Of a function of a batch, to be differentiated afterwards.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jit": quick_jit,
    "vmap": lambda f: jax.vmap(lambda x: f(x[None])[0]),
    "scan": lambda f: lambda x: jax.lax.map(f, x.reshape(2, -1, x.shape[-1])).reshape(len(x), -1),
    "remat": jax.checkpoint,
    "remat in a vmap in a scan": lambda f: (
        lambda x: jax.lax.map(
            jax.vmap(jax.checkpoint(lambda x: f(x[None])[0])), x.reshape(2, -1, x.shape[-1])
        ).reshape(len(x), -1)
    ),
}


@functools.cache
def trained(front_end, build=chain):
    model = build(front_end, CONFIG)
    return model, random_adapters(model.adapters)


def objective(front_end, transform, build=chain):
    """Returns `(params, adapters, x) -> loss, y`."""
    model, _ = trained(front_end, build)

    def loss(adapters, params, x):
        y = transform(lambda x: model.apply(params, adapters, x))(x)
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(loss, has_aux=True)


def batch(build=chain):
    return inputs(BATCH, CHAIN[0] if build is chain else WIDTH)


@functools.cache
def untransformed():
    """The values and gradients op by op, which are the same in both front ends."""
    model, adapters = trained("linen")
    return objective("linen", lambda f: f)(adapters, model.params, batch())


def assert_close(found, expected, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(np.asarray(b) != 0)
        assert reference.relative_error(a, b) <= tolerance


@pytest.mark.rows(3)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_values_and_gradients_are_those_without_the_transform(front_end, transform):
    model, adapters = trained(front_end)
    run = quick_jit(objective(front_end, TRANSFORMS[transform]))
    assert_close(run(adapters, model.params, batch()), untransformed(), 5e-6)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_forward_mode_is_the_gradient(front_end):
    model, adapters = trained(front_end)
    direction = random_adapters(model.adapters, seed=5)
    _, slope = quick_jit(
        lambda a, d: jax.jvp(
            lambda a: jnp.sum(jnp.sin(model.apply(model.params, a, batch()))), (a,), (d,)
        )
    )(adapters, direction)
    _, gradients = untransformed()
    products = jax.tree.map(
        lambda g, d: np.sum(np.multiply(*reference.wide(g, d))), gradients, direction
    )
    assert np.isclose(slope, sum(jax.tree.leaves(products)), rtol=1e-5)


@pytest.mark.rows(1)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_vmap_over_adapters_trains_each_as_if_alone(front_end):
    """A sweep of seeds or learning rates in one step."""
    model, _ = trained(front_end)
    several = [random_adapters(model.adapters, seed) for seed in range(2)]
    run = objective(front_end, lambda f: f)
    together = quick_jit(jax.vmap(run, in_axes=(0, None, None)))(
        dora.adapters.stack_adapters(several), model.params, batch()
    )
    alone = quick_jit(run)
    for i, adapters in enumerate(several):
        found = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_close(found, alone(adapters, model.params, batch()), 5e-6)


# A layer that is called twice.


class LinenTwice(linen.Module):
    shared: bool

    @linen.compact
    def __call__(self, x):
        first = linen.Dense(WIDTH, name="first")
        second = first if self.shared else linen.Dense(WIDTH, name="second")
        return second(jnp.tanh(first(x)))


class NNXTwice(nnx.Module):
    def __init__(self, rngs, shared):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second = self.first if shared else nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def twice(front_end, params, *, shared):
    if front_end == "linen":
        return of_linen(LinenTwice(shared), params, inputs(1, WIDTH), CONFIG)
    return of_nnx(functools.partial(NNXTwice, shared=shared), params, CONFIG)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_shared_layer_has_the_gradient_of_all_its_calls(front_end):
    layer = parameters(nnx_model(functools.partial(NNXTwice, shared=True)))["first"]
    one = twice(front_end, {"first": layer}, shared=True)
    two = twice(front_end, {"first": layer, "second": layer}, shared=False)
    adapter, x = random_adapters(one.adapters)["first"], inputs(BATCH, WIDTH)

    def run(model, adapters):
        def loss(adapters):
            y = model.apply(model.params, adapters, x)
            return jnp.sum(jnp.sin(y)), y

        return quick_jit(jax.grad(loss, has_aux=True))(adapters)

    gradients, y = run(one, {"first": adapter})
    of_each, expected = run(two, {"first": adapter, "second": adapter})
    assert_close(y, expected)
    assert_close(
        gradients["first"], jax.tree.map(jnp.add, of_each["first"], of_each["second"]), 5e-6
    )


# States of an NNX model.


def test_an_nnx_state_of_adapters_carries_the_training_to_another_copy():
    def adapted():
        return dora.apply_dora(
            nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs)), CONFIG, rngs=nnx.Rngs(1)
        )

    model, other = adapted(), adapted()
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    x, run = batch(), nnx.jit(lambda model, x: model(x))
    y = run(model, x)
    assert not same(run(other, x), y)
    nnx.update(other, nnx.state(model, dora.DoRAParam))
    assert same(run(other, x), y)
    graphdef, state = nnx.split(model)
    assert same(run(nnx.merge(graphdef, state), x), y)
    pure, abstract = nnx.to_pure_dict(state), nnx.state(nnx.eval_shape(adapted))
    nnx.replace_by_pure_dict(abstract, pure)
    assert same(run(nnx.merge(graphdef, abstract), x), y)
    base = nnx.state(model, nnx.Param)
    assert {str(path[-1]) for path, _ in nnx.to_flat_state(base)} == {"kernel", "bias"}


@pytest.mark.full
def test_an_nnx_gradient_is_that_of_the_pure_function():
    model = dora.apply_dora(
        nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs)), CONFIG, rngs=nnx.Rngs(1)
    )
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    split: Any = nnx.split
    graphdef, trainable, rest = split(model, dora.DoRAParam, ...)
    x = batch()

    @nnx.jit
    def through_nnx(model):
        def loss(model):
            return jnp.sum(jnp.sin(model(x)))

        return nnx.grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model)

    @quick_jit
    def through_jax(trainable, rest):
        return jax.grad(lambda t: jnp.sum(jnp.sin(nnx.merge(graphdef, t, rest)(x))))(trainable)

    assert_close(through_nnx(model), through_jax(trainable, rest))


# Batch statistics, which change while the model runs.


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, name="up")(x)
        return linen.Dense(5, name="head")(
            linen.BatchNorm(use_running_average=False, name="norm")(x)
        )


class NNXNormed(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.up(x)))


@pytest.mark.full
def test_batch_statistics_are_those_of_the_merged_linen_model():
    module, x = LinenNormed(), inputs(BATCH, WIDTH)
    variables = linen_variables(module, x)
    stats = {"batch_stats": variables["batch_stats"]}
    model, adapters = dora.apply_dora(
        module,
        CONFIG,
        params=variables["params"],
        rng=jax.random.key(1),
        inputs=dora.linen.ExampleCall((x,), variables=stats),
    )
    adapters = random_adapters(adapters)
    y, updated = model.apply(
        {"params": variables["params"], "dora": adapters, **stats}, x, mutable=["batch_stats"]
    )
    merged = dora.merge(model, variables["params"], adapters)
    expected = module.apply({"params": merged, **stats}, x, mutable=["batch_stats"])
    assert set(updated) == {"batch_stats"}
    assert_close((y, updated), expected, 1e-5)
    assert not same(updated, stats)


def test_batch_statistics_are_those_of_the_merged_nnx_model():
    model = dora.apply_dora(NNXNormed(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    merged, x, run = dora.merge(model), inputs(BATCH, WIDTH), nnx.jit(lambda model, x: model(x))
    assert_close(run(model, x), run(merged, x), 1e-5)
    found, expected = (nnx.state(m, nnx.BatchStat) for m in (model, merged))
    assert_close(found, expected, 1e-5)
    assert not same(found, nnx.state(NNXNormed(nnx.Rngs(0)), nnx.BatchStat))


# Two devices. How many a host has is settled when JAX starts, hence another process.

DEVICES = 2


@pytest.mark.full
@pytest.mark.parametrize(
    "models",
    [
        (("linen", "stack"), ("nnx", "chain")),
        pytest.param((("linen", "chain"), ("nnx", "stack")), marks=pytest.mark.full),
    ],
)
def test_sharded_over_two_devices_values_and_gradients_are_those_of_one(models):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import tests.laws.test_transforms as t; t.compare_with_two_devices({models})",
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()},
        cwd=Path(__file__).parents[2],
        check=True,
    )


def compare_with_two_devices(models):
    assert jax.device_count() == DEVICES
    for front_end, name in models:
        build = {"chain": chain, "stack": stack}[name]
        model, adapters = trained(front_end, build)
        expected = quick_jit(objective(front_end, lambda f: f, build))(
            adapters, model.params, batch(build)
        )
        for run in (batch_over_devices, features_over_devices):
            assert_close(run(front_end, build), expected, 5e-6)


def batch_over_devices(front_end, build):
    """Data parallel, by `shard_map`; the adapters are whole on every device."""
    model, adapters = trained(front_end, build)
    mesh = Mesh(jax.devices(), ("data",))

    def loss(adapters, params, x):
        def shard(params, adapters, x):
            y = model.apply(params, adapters, x)
            return jnp.sum(jnp.sin(y))[None], y

        run = jax.shard_map(
            shard, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P("data"), P("data"))
        )
        losses, y = run(params, adapters, x)
        return jnp.sum(losses), y

    return quick_jit(jax.value_and_grad(loss, has_aux=True))(adapters, model.params, batch(build))


def features_over_devices(front_end, build):
    """Every array whose last axis two devices can share is split along it; XLA does the rest."""
    model, adapters = trained(front_end, build)
    mesh = Mesh(jax.devices(), ("model",))

    def place(leaf):
        spec = P(*[None] * (leaf.ndim - 1), "model") if leaf.shape[-1] % DEVICES == 0 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params, adapters = jax.tree.map(place, (model.params, adapters))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(adapters))
    x = jax.device_put(batch(build), NamedSharding(mesh, P()))
    return quick_jit(objective(front_end, lambda f: f, build))(adapters, params, x)
