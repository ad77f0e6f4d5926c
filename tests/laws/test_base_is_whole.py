"""The base is never written to, and shares no memory with anything that is trained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.names import IDENTITY
from dora_jax.peft import load_pretrained, save_pretrained
from tests.support.models import random_adapters, same
from tests.support.quick import quick_jit

CONFIG = dora.DoRAConfig(rank=2, dropout=0.5, target_modules=["up"], modules_to_save=["head"])
X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(self.up(x))))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="head")(linen.Dense(5, name="up")(x))


def of_numpy(x):
    return np.array(x)


def read_only(x):
    x = np.array(x)
    x.flags.writeable = False
    return x


def big_endian(x):
    return np.array(x).astype(np.asarray(x).dtype.newbyteorder(">"))


def nnx_base(kind=jnp.array):
    """A model in eval mode with random parameters, each made by `kind` from an array."""
    model = nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            value = rng.normal(size=variable.shape).astype(np.float32) ** 2 + 0.1
            variable.set_value(kind(value))
    model.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model.eval()
    return model


def linen_base(kind=jnp.array):
    params = nnx.to_pure_dict(nnx.state(nnx_base(kind), nnx.Param))
    return {name: params[name] for name in ("up", "head")}


def adapt(base):
    return dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1))


def adapt_linen(params):
    return dora.apply_dora(LinenModel(), CONFIG, params=params, rng=jax.random.key(1), inputs=(X,))


def contents(source):
    """Returns copies of all arrays of a model or tree; fails where one was deleted."""
    tree = nnx.to_pure_dict(nnx.state(source)) if isinstance(source, nnx.Module) else source
    return [
        np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


@functools.partial(quick_jit, static_argnums=0)
def run_split(graphdef, state):
    return nnx.merge(graphdef, state)(X)


def run(model):
    return run_split(*nnx.split(model))


def equal(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [of_numpy, read_only, big_endian])
def test_an_nnx_base_of_numpy_arrays_is_left_whole(kind):
    base = nnx_base(kind)
    before, expected = contents(base), run(nnx_base())
    adapted = adapt(base)
    assert np.array_equal(run(adapted), expected)
    dora.set_adapters(adapted, random_adapters(dora.get_adapters(adapted)))
    output = run(adapted)
    merged = dora.merge(adapted)
    np.testing.assert_allclose(run(merged), output, rtol=1e-4, atol=1e-4)
    assert np.array_equal(run(adapted), output)
    dora.set_adapters(adapted, dora.disabled_adapters(adapted))
    adapted.norm.mean[...] = jnp.ones(5)  # as a call in train mode does
    assert equal(contents(base), before)


def test_a_memory_mapped_base_is_left_whole(tmp_path):
    file = tmp_path / "kernel.npy"
    np.save(file, np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32))
    written = file.read_bytes()
    base = nnx_base()
    base.up.kernel = nnx.Param(np.load(file, mmap_mode="r+"))
    adapted = adapt(base)
    dora.set_adapters(adapted, random_adapters(dora.get_adapters(adapted)))
    dora.merge(adapted)
    with pytest.raises(ValueError, match="read-only"):
        adapted.up.kernel[...] = jnp.zeros((6, 5))
    base.up.kernel.get_value().flush()
    assert file.read_bytes() == written


@pytest.mark.parametrize("kind", [of_numpy, read_only])
def test_linen_parameters_of_numpy_arrays_are_left_whole(kind):
    params = linen_base(kind)
    before = contents(params)
    model, adapters = adapt_linen(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(adapters))
    adapters = random_adapters(adapters)
    output = model.apply({"params": params, "dora": adapters}, X)
    merged = dora.merge(model, params, adapters)
    np.testing.assert_allclose(LinenModel().apply({"params": merged}, X), output, rtol=1e-4)
    assert equal(contents(params), before)


def test_linen_parameters_in_a_byte_order_that_jax_does_not_read_are_named():
    model, adapters = adapt_linen(linen_base())
    foreign = linen_base() | {"head": jax.tree.map(big_endian, linen_base()["head"])}
    for use in (
        lambda: adapt_linen(foreign),
        lambda: dora.merge(model, foreign, adapters),
        lambda: dora.precompute_scales(model, foreign, adapters),
    ):
        with pytest.raises(dora.errors.AdapterError, match=r"head\.bias is in a byte order"):
            use()


def donate(source):
    """Deletes what a step changes and may donate: what DoRA trains, and what a call changes."""
    tree = source
    if isinstance(source, nnx.Module):
        changing = nnx.Any(dora.DoRAParam, nnx.BatchStat, nnx.RngState)
        tree = nnx.to_pure_dict(nnx.state(source, changing))
    for x in jax.tree.leaves(tree):
        x.delete()


def with_tree(tree):
    model = adapt(nnx_base())
    dora.set_adapters(model, tree)
    return model


def own_tree():
    return jax.tree.map(jnp.copy, dora.get_adapters(adapt(nnx_base())))


def own_adapted():
    return adapt(nnx_base())


# What makes a source, and an operation that makes something of it.
NNX = {
    "apply_dora": (nnx_base, adapt),
    "merge": (own_adapted, dora.merge),
    "precompute_scales": (own_adapted, dora.precompute_scales),
    "disabled_adapters": (own_adapted, dora.disabled_adapters),
    "set_adapters": (own_tree, with_tree),
    "set_adapters, disabled": (lambda: dora.disabled_adapters(own_adapted()), with_tree),
    "cast_adapters": (own_tree, lambda tree: dora.adapters.cast_adapters(tree, jnp.float32)),
}


def nnx_files(folder):
    def loaded(base):
        dora.save(folder / "own", adapt(base), CONFIG, overwrite=True)
        return dora.load(folder / "own", base)

    def loaded_in_part(adapted):
        dora.save(folder / "part", adapted, CONFIG, overwrite=True)
        return dora.load(folder / "part", adapted, only=["up"])

    def from_peft(base):
        save_pretrained(adapt(base), folder / "peft", IDENTITY)
        return load_pretrained(base, folder / "peft", IDENTITY)

    def restored(adapted):
        with dora.Checkpoints(folder / "run", CONFIG) as checkpoints:
            checkpoints.save(1 + max(checkpoints.steps(), default=0), adapted)
            other = adapt(nnx_base())
            checkpoints.restore(other)
        return other

    return {
        "load": (nnx_base, loaded),
        "load in part": (own_adapted, loaded_in_part),
        "load_pretrained": (nnx_base, from_peft),
        "restore": (own_adapted, restored),
    }


def linen_operations():
    params = linen_base()
    model, _ = adapt_linen(params)

    def own():
        return adapt_linen(params)[1]

    def with_model(use):
        """The source is the tree, the model's records and the parameters."""
        return (lambda: (own(), model.base_collection, params)), use

    return {
        "apply_dora": ((lambda: params), lambda params: adapt_linen(params)[1]),
        "merge": (own, lambda adapters: dora.merge(model, params, adapters)["head"]),
        "precompute_scales": (own, lambda own: dora.precompute_scales(model, params, own)),
        "disabled_adapters": with_model(lambda all: dora.disabled_adapters(model, all[0])),
    }


def check_memory(operations):
    for name, (make, operation) in operations.items():
        source = make()
        product = operation(source)
        before = contents(source)
        donate(product)
        assert equal(contents(source), before), name
        if name == "apply_dora" or isinstance(source, tuple):  # the source is not trained
            continue
        source = make()
        product = operation(source)
        before = contents(product)
        donate(source)
        assert equal(contents(product), before), name


@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_what_is_trained_shares_no_memory(front_end):
    check_memory(NNX if front_end == "nnx" else linen_operations())


@pytest.mark.full
def test_what_is_loaded_shares_no_memory(tmp_path):
    check_memory(nnx_files(tmp_path))


def test_factors_that_start_away_from_zero_share_no_memory_with_their_record():
    config = dora.DoRAConfig(rank=2, init="olora", target_modules=["up"])
    adapted = dora.apply_dora(nnx_base(), config, rngs=nnx.Rngs(1))
    disabled = dora.disabled_adapters(adapted)
    before = nnx.to_pure_dict(nnx.state(dora.merge(adapted), nnx.Param))
    donate(disabled)
    assert same(nnx.to_pure_dict(nnx.state(dora.merge(adapted), nnx.Param)), before)
    other = nnx.clone(adapted)
    donate(adapted)
    assert all(np.isfinite(x).all() for x in contents(nnx.state(other, dora.nnx.BaseParam)))


@pytest.mark.full
def test_a_step_that_donates_what_it_trains_leaves_the_base_whole():
    base = nnx_base()
    before, model = contents(base), adapt(base)
    graphdef, trained, rest = nnx.split(model, dora.DoRAParam, ...)

    @jax.jit
    def loss(trained, rest):
        return jnp.sum(nnx.merge(graphdef, trained, rest)(X) ** 2)

    step = jax.jit(
        lambda trained, rest: jax.tree.map(
            lambda x, g: x - 0.1 * g, trained, jax.grad(loss)(trained, rest)
        ),
        donate_argnums=0,
    )
    for _ in range(2):
        trained = step(trained, rest)
    assert np.isfinite(loss(trained, rest))
    assert equal(contents(base), before)
