"""What is peculiar to Linen: lifted transforms, collections, methods, boxes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta

import dora_jax as dora
from tests.support import reference
from tests.support.models import inputs, linen_variables, random_adapters, same, structure
from tests.support.quick import quick_jit

WIDTH = 16


def dense(features=WIDTH, **options):
    return nn.Dense(features, bias_init=nn.initializers.normal(), **options)


class Block(nn.Module):
    """A block in the form that `nn.scan` takes."""

    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(dense(name="up")(x)), None


class Scanned(nn.Module):
    split_dropout: bool = True
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True}
            if self.split_dropout
            else {"params": True},
            length=3,
        )
        return stack(name="blocks")(x, None)[0]


class ScannedShared(nn.Module):
    """One block, run three times over."""

    @nn.compact
    def __call__(self, x):
        repeat = nn.scan(
            Block,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            length=3,
        )
        return repeat(name="block")(x, None)[0]


class ScannedTwice(nn.Module):
    """Stacks of two in a stack of three: kernels of four axes."""

    @nn.compact
    def __call__(self, x):
        def lift(module, length):
            return nn.scan(
                module,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=length,
            )

        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                return lift(Block, 2)(name="inner")(x, None)[0], None

        return lift(Inner, 3)(name="outer")(x, None)[0]


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=None,
            axis_size=3,
        )
        return heads(name="heads")(x)[0]


class VmappedShared(nn.Module):
    """One set of parameters for every row of the batch."""

    @nn.compact
    def __call__(self, x):
        rows = nn.vmap(
            Block, variable_axes={"params": None}, split_rngs={"params": False, "dropout": True}
        )
        return rows(name="row")(x)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name="block")(x)[0]


class RematScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Scanned(remat=True, name="stack")(x)


class Shared(nn.Module):
    """One layer, called twice."""

    @nn.compact
    def __call__(self, x):
        layer = dense(name="layer")
        return layer(jnp.tanh(layer(x)))


class Setup(nn.Module):
    def setup(self):
        self.layers = [dense(), dense()]
        self.named = {"head": dense(5)}

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.named["head"](x)

    def encode(self, x):
        return self.layers[0](x)


class Sharing(nn.Module):
    """A wrapper without a scope of its own: parameters stand where the wrapped layer's would."""

    @nn.compact
    def __call__(self, x):
        layer = dense()
        nn.share_scope(self, layer)
        return layer(x) + 1


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Sharing(name="inner")(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(Block)(name="block")(x)[0]


class Norms(nn.Module):
    """Further collections and streams: batch statistics, and the model's own dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = dense(name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        self.sow("intermediates", "normalised", x)
        return dense(5, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


MODULES = {
    "scan": Scanned(),
    "scan over one block": ScannedShared(),
    "scan in a scan": ScannedTwice(),
    "remat in a scan": RematScanned(),
    "vmap": Vmapped(),
    "vmap over one block": VmappedShared(),
    "remat": Remat(),
    "one layer twice": Shared(),
    "setup": Setup(),
    "share_scope": Outer(),
    "jit": Jitted(),
    "batch norm": Norms(),
    "one layer": dense(),
}


@functools.cache
def initialised(module: nn.Module):
    variables = linen_variables(module, inputs(5, WIDTH))
    return variables, jax.jit(lambda variables, x: module.apply(variables, x))


def adapt(module: nn.Module, variables, **fields):
    others = {name: value for name, value in variables.items() if name != "params"}
    return dora.apply_dora(
        module,
        dora.DoRAConfig(**{"rank": 2, **fields}),
        params=variables["params"],
        rng=jax.random.key(1),
        inputs=dora.linen.ExampleCall(
            (jax.ShapeDtypeStruct((5, WIDTH), jnp.float32),), variables=others
        ),
    )


@functools.cache
def adapted(module: nn.Module, dropout: float = 0.0):
    return adapt(module, initialised(module)[0], dropout=dropout)


@functools.cache
def jitted(model: dora.DoRAModel):
    return jax.jit(lambda v, a, x, options: model.apply({**v, "dora": a}, x, **options))


def run(model, variables, adapters, x, **options):
    return jitted(model)(variables, adapters, x, options)


@pytest.mark.rows(4)
@pytest.mark.parametrize(
    ("name", "dropout"),
    [(name, 0.0) for name in MODULES]
    + [("scan", 0.5), ("one layer twice", 0.5)]
    + [
        pytest.param(name, 0.5, marks=pytest.mark.full)
        for name in ("scan over one block", "vmap", "remat")
    ],
)
def test_adapting_changes_no_bit(name, dropout):
    (variables, base), x = initialised(MODULES[name]), inputs(5, WIDTH)
    model, adapters = adapted(MODULES[name], dropout)
    options = {"rngs": {"dropout": jax.random.key(2)}} if dropout else {}
    assert same(run(model, variables, adapters, x, **options), base(variables, x))
    assert same(dora.merge(model, variables["params"], adapters), variables["params"])


@pytest.mark.rows(6)
@pytest.mark.parametrize("name", MODULES)
def test_a_merged_model_computes_what_the_adapted_one_does(name):
    (variables, base), x = initialised(MODULES[name]), inputs(5, WIDTH)
    model, adapters = adapted(MODULES[name])
    adapters = random_adapters(adapters)
    before = jax.tree.map(jnp.copy, variables)
    y = run(model, variables, adapters, x)
    merged = dora.merge(model, variables["params"], adapters)
    assert reference.relative_error(base({**variables, "params": merged}, x), y) <= 1e-5
    assert np.any(np.asarray(base(variables, x) != y))
    assert same(variables, before)


@pytest.mark.parametrize("name", ["scan", "vmap", "remat in a scan"])
def test_every_layer_of_a_stack_has_its_own_norm(name):
    variables, _ = initialised(MODULES[name])
    model, adapters = adapted(MODULES[name])
    adapters = random_adapters(adapters)
    (kernel,) = (leaf for leaf in jax.tree.leaves(variables) if leaf.ndim == 3)
    a, b, m = jax.tree.leaves(adapters)
    assert m.shape == (3, WIDTH)
    merged = jax.tree.leaves(dora.merge(model, variables["params"], adapters))
    (found,) = (leaf for leaf in merged if leaf.ndim == 3)
    expected = reference.merged(kernel, a, b, m, model.config.layer_settings(()).scaling)
    assert reference.relative_error(found, expected) <= 2e-6


def test_stacks_in_stacks_have_two_stack_axes():
    _, adapters = adapted(ScannedTwice())
    assert jax.tree.map(jnp.shape, adapters["outer"]["inner"]["up"]) == {
        "lora_a": (3, 2, WIDTH, 2),
        "lora_b": (3, 2, 2, WIDTH),
        "magnitude": (3, 2, WIDTH),
    }


@pytest.mark.parametrize("name", ["one layer twice", "vmap over one block", "scan over one block"])
def test_a_shared_layer_has_one_adapter(name):
    assert len(jax.tree.leaves(adapted(MODULES[name])[1])) == 3


def test_gradients_under_scan_and_remat_are_those_without_remat():
    x, target = inputs(5, WIDTH), inputs(5, WIDTH, seed=4)

    def gradients(module):
        variables, _ = initialised(module)
        model, adapters = adapted(module)

        def loss(adapters):
            return jnp.sum(target * model.apply({**variables, "dora": adapters}, x))

        return jax.tree.leaves(quick_jit(jax.grad(loss))(random_adapters(adapters)))

    assert same(
        jax.tree.leaves(initialised(Scanned())[0]),
        jax.tree.leaves(initialised(Scanned(remat=True))[0]),
    )
    for a, b in zip(gradients(Scanned()), gradients(Scanned(remat=True)), strict=True):
        assert np.all(np.any(np.asarray(a) != 0, axis=tuple(range(1, a.ndim))))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_methods_other_than_call_are_adapted():
    module = Setup()
    variables, _ = initialised(module)
    x = inputs(5, WIDTH)
    model, adapters = adapted(module)
    encoded = module.apply(variables, x, method="encode")
    assert same(model.apply({**variables, "dora": adapters}, x, method="encode"), encoded)
    trained = {**variables, "dora": random_adapters(adapters)}
    y = model.apply(trained, x, method=Setup.encode)
    merged = dora.merge(model, variables["params"], trained["dora"])
    expected = module.apply({"params": merged}, x, method="encode")
    assert reference.relative_error(y, expected) <= 1e-5


def test_the_call_that_is_traced_may_be_another_method():
    module = Setup()
    variables, _ = initialised(module)
    _, adapters = dora.apply_dora(
        module,
        dora.DoRAConfig(rank=2),
        params=variables["params"],
        rng=jax.random.key(1),
        inputs=dora.linen.ExampleCall((inputs(5, WIDTH),), method="encode"),
    )
    assert list(adapters) == ["layers_0"]


def test_other_collections_are_updated_and_adapters_kept_out_of_them():
    module, x = Norms(), inputs(5, WIDTH)
    variables, _ = initialised(module)
    model, adapters = adapted(module)
    rngs = {"dropout": jax.random.key(2)}
    mutable = ["batch_stats", "intermediates"]
    y, updated = module.apply(variables, x, train=True, rngs=rngs, mutable=mutable)
    ours = {**variables, "dora": adapters}
    y_adapted, updated_adapted = model.apply(ours, x, train=True, rngs=rngs, mutable=mutable)
    assert same(y_adapted, y)
    assert same(updated_adapted, updated)
    _, everything = model.apply(ours, x, mutable=True)
    assert same(everything["params"], variables["params"])


def test_intermediates_are_captured():
    module, x = Norms(), inputs(5, WIDTH)
    variables, _ = initialised(module)
    model, adapters = adapted(module)
    options: dict[str, Any] = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, plain = module.apply(variables, x, **options)
    _, ours = model.apply({**variables, "dora": adapters}, x, **options)
    assert same(ours, plain)


def test_frozen_dictionaries_are_read():
    variables, base = initialised(Setup())
    x = inputs(5, WIDTH)
    model, adapters = adapt(Setup(), freeze(variables))
    assert same(run(model, freeze(variables), freeze(adapters), x), base(variables, x))
    merged = dora.merge(model, FrozenDict(variables["params"]), freeze(adapters))
    assert same(merged, variables["params"])


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        bias = nn.with_partitioning(nn.initializers.normal(), ("model",))
        x = nn.Dense(WIDTH, kernel_init=init, bias_init=bias, name="up")(x)
        return nn.Dense(5, kernel_init=init, name="head")(x)


@pytest.mark.parametrize("modules_to_save", [[], ["head"]])
def test_boxed_parameters_stay_boxed(modules_to_save):
    (variables, base), x = initialised(Boxed()), inputs(5, WIDTH)
    params = variables["params"]
    assert isinstance(params["up"]["kernel"], nn.Partitioned)
    model, adapters = adapt(Boxed(), variables, modules_to_save=modules_to_save)
    assert adapters["up"]["lora_b"].names == (None, "model")
    assert same(run(model, variables, adapters, x), base(variables, x))
    trained = random_adapters(meta.unbox(adapters))
    merged = dora.merge(model, params, trained)
    assert structure(merged) == structure(params)
    assert merged["up"]["kernel"].names == (None, "model")
    y = run(model, variables, trained, x)
    assert reference.relative_error(base({"params": merged}, x), y) <= 1e-5


def test_dropout_needs_a_stream_and_acts_on_the_low_rank_branch_only():
    module, x = dense(32), inputs(5, 64)
    variables = linen_variables(module, x)
    config = dora.DoRAConfig(rank=8, dropout=0.25)
    model, adapters = dora.apply_dora(
        module, config, params=variables["params"], rng=jax.random.key(1), inputs=(x,)
    )
    trained = random_adapters(adapters)
    expected = x @ reference.merged(
        variables["params"]["kernel"], **trained, scaling=config.layer_settings(()).scaling
    )
    expected = expected + variables["params"]["bias"]
    y = run(model, variables, trained, x)
    assert reference.relative_error(y, expected) <= 2e-6
    assert same(run(model, variables, trained, x, rngs={"params": jax.random.key(3)}), y)
    dropped = [
        run(model, variables, trained, x, rngs={"dropout": jax.random.key(i)}) for i in (3, 3, 4)
    ]
    assert same(dropped[0], dropped[1])
    assert not same(dropped[0], dropped[2])
    assert not same(dropped[0], y)
    without_branch = {**trained, "lora_b": jnp.zeros((8, 32))}
    a, b = (
        run(model, variables, without_branch, x, **options)
        for options in ({}, {"rngs": {"dropout": jax.random.key(3)}})
    )
    assert same(a, b)


def test_one_key_serves_every_stream():
    variables, _ = initialised(Shared())
    x = inputs(5, WIDTH)
    model, adapters = adapted(Shared(), 0.5)
    trained = {**variables, "dora": random_adapters(adapters)}
    assert not same(model.apply(trained, x, rngs=jax.random.key(3)), model.apply(trained, x))


def test_dropout_keeps_the_mean():
    module, x = dense(32), inputs(1, 64)
    variables = linen_variables(module, x)
    model, adapters = dora.apply_dora(
        module,
        dora.DoRAConfig(rank=8, dropout=0.25),
        params=variables["params"],
        rng=jax.random.key(1),
        inputs=(x,),
    )
    adapters = random_adapters(adapters)
    many = jnp.broadcast_to(x, (20_000, 64))
    dropped = run(model, variables, adapters, many, rngs={"dropout": jax.random.key(2)})
    plain = run(model, variables, adapters, x)[0]
    error = np.abs(jnp.mean(dropped, 0) - plain) / jnp.std(dropped, 0)
    assert np.max(error) < 5 / np.sqrt(20_000)


def test_the_layers_of_a_stack_drop_apart():
    """Three equal heads over one input: the same output, unless their masks differ."""

    def alike(tree):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), tree)

    x = inputs(5, WIDTH)
    variables = alike(initialised(Vmapped())[0])
    model, adapters = adapt(Vmapped(), variables, dropout=0.5)
    adapters = alike(random_adapters(adapters))
    dropped = run(model, variables, adapters, x, rngs={"dropout": jax.random.key(2)})
    assert not same(dropped[0], dropped[1])
    assert not same(dropped[1], dropped[2])
    plain = run(model, variables, adapters, x)
    np.testing.assert_allclose(plain, alike(plain), rtol=1e-6)


def test_a_scan_that_keeps_the_dropout_stream_back_is_named():
    module = Scanned(split_dropout=False)
    variables, base = initialised(module)
    x = inputs(5, WIDTH)
    model, adapters = adapted(module, 0.5)
    ours = {**variables, "dora": adapters}
    assert same(run(model, variables, adapters, x), base(variables, x))
    with pytest.raises(
        dora.errors.AdapterError, match=r"blocks.up: adapter dropout needs the stream"
    ):
        model.apply(ours, x, rngs={"dropout": jax.random.key(2)})


def test_an_abstract_base_gives_abstract_adapters():
    variables, _ = initialised(Scanned())
    _, real = adapted(Scanned())
    _, abstract = adapt(Scanned(), jax.eval_shape(lambda: variables))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), real
    )


def test_a_layer_called_by_keyword_is_adapted():
    class ByKeyword(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense(name="up")(inputs=x)

    module, x = ByKeyword(), inputs(5, WIDTH)
    variables, base = initialised(module)
    model, adapters = adapted(module)
    assert same(run(model, variables, adapters, x), base(variables, x))
    y = run(model, variables, random_adapters(adapters), x)
    assert np.all(np.asarray(y != base(variables, x)))


def test_adapters_are_one_pytree_that_can_be_vmapped():
    """Two adapters of one base, in one call."""
    variables, _ = initialised(Scanned())
    x = inputs(5, WIDTH)
    model, adapters = adapted(Scanned())
    trees = [random_adapters(adapters, seed=seed) for seed in (1, 2)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    y = jax.vmap(lambda a: model.apply({**variables, "dora": a}, x))(both)
    for found, tree in zip(y, trees, strict=True):
        np.testing.assert_allclose(found, run(model, variables, tree, x), rtol=1e-5, atol=1e-6)
