"""What is peculiar to NNX: layers that carry their adapter, lifted transforms, states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from tests.support import reference
from tests.support.models import NNXChain, inputs, nnx_model, random_adapters, same

WIDTH = 16
CONFIG = dora.DoRAConfig(rank=2)


def adapt(model, seed=1, **fields):
    return dora.apply_dora(model, dora.DoRAConfig(**{"rank": 2, **fields}), rngs=nnx.Rngs(seed))


def train(model, seed=3):
    """Moves the adapters of a model far from their start, in place."""
    dora.set_adapters(model, random_adapters(dora.get_adapters(model), seed))
    return model


def base_state(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs, bias_init=nnx.initializers.normal())

    def __call__(self, x):
        return jnp.tanh(self.up(x))


def stack_of_blocks(layers, rngs):
    return nnx.vmap(Block)(rngs.split(layers))


class Scanned(nnx.Module):
    """Three blocks whose parameters are stacked in front."""

    def __init__(self, rngs):
        self.blocks = stack_of_blocks(3, rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def step(x, block):
            return block(x)

        return step(x, self.blocks)


class ScannedRemat(Scanned):
    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def step(x, block):
            return block(x)

        return step(x, self.blocks)


class Vmapped(nnx.Module):
    """Three heads, each with parameters of its own."""

    def __init__(self, rngs):
        self.heads = stack_of_blocks(3, rngs)

    def __call__(self, x):
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, None))(self.heads, x)


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.block = Block(rngs)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


class Shared(nnx.Module):
    """One layer under two names, called twice."""

    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs, bias_init=nnx.initializers.normal())
        self.second = self.first

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


MODELS = [Scanned, ScannedRemat, Vmapped, Remat, Shared, Listed]


@nnx.jit
def run(model, x):
    return model(x)


@pytest.mark.rows(4)
@pytest.mark.parametrize(
    ("model_class", "dropout"),
    [(model, 0.0) for model in MODELS]
    + [(model, 0.5) for model in (ScannedRemat, Vmapped, Shared)],
)
def test_adapting_changes_no_bit(model_class, dropout):
    model, x = nnx_model(model_class), inputs(5, WIDTH)
    adapted = adapt(model, dropout=dropout)
    assert same(run(adapted, x), run(model, x))
    assert same(run(dora.merge(adapted), x), run(model, x))


@pytest.mark.parametrize("model_class", MODELS)
def test_a_merged_model_computes_what_the_adapted_one_does(model_class):
    adapted, x = train(adapt(nnx_model(model_class))), inputs(5, WIDTH)
    y = run(adapted, x)
    assert reference.relative_error(run(dora.merge(adapted), x), y) <= 1e-5
    assert np.any(np.asarray(run(nnx_model(model_class), x) != y))


@pytest.mark.parametrize("model_class", [Scanned, Vmapped])
def test_every_layer_of_a_stack_has_its_own_norm(model_class):
    adapted = train(adapt(nnx_model(model_class)))
    ((path, layer),) = dora.get_adapters(adapted).items()
    adapter = layer["up"]
    assert adapter["magnitude"].shape == (3, WIDTH)
    kernel = base_state(adapted)[path]["up"]["kernel"]
    expected = reference.merged(
        kernel,
        adapter["lora_a"],
        adapter["lora_b"],
        adapter["magnitude"],
        CONFIG.layer_settings(()).scaling,
    )
    merged = base_state(dora.merge(adapted))[path]["up"]["kernel"]
    assert reference.relative_error(merged, expected) <= 2e-6
    start = dora.get_adapters(adapt(nnx_model(model_class)))[path]["up"]["lora_a"]
    assert not same(start[0], start[1])


def test_a_scanned_stack_is_its_layers_one_by_one():
    adapted, x = train(adapt(nnx_model(Scanned))), inputs(5, WIDTH)
    one_by_one = x
    for i in range(3):
        graphdef, state = nnx.split(adapted.blocks)
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        one_by_one = block(one_by_one)
    np.testing.assert_allclose(run(adapted, x), one_by_one, rtol=1e-5, atol=1e-6)


def test_a_shared_layer_has_one_adapter():
    adapted = adapt(nnx_model(Shared))
    assert adapted.first is adapted.second
    assert list(dora.get_adapters(adapted)) == ["first"]
    merged = dora.merge(adapted)
    assert merged.first is merged.second


@pytest.mark.parametrize("model_class", MODELS)
def test_base_parameters_stay_where_they_are(model_class):
    model = nnx_model(model_class)
    adapted = adapt(model)
    assert same(base_state(adapted), base_state(model))


def test_a_base_checkpoint_restores_into_the_adapted_model():
    model, adapted, x = nnx_model(Listed), adapt(nnx_model(Listed)), inputs(5, WIDTH)
    checkpoint = nnx.state(model, nnx.Param)
    for kernel in (adapted.head.kernel, adapted.layers[0].up.kernel):
        kernel[...] = jnp.zeros_like(kernel[...])
    assert np.all(np.isnan(run(adapted, x)))
    nnx.update(adapted, checkpoint)
    assert same(run(adapted, x), run(model, x))


def test_another_checkpoint_is_found_out():
    adapted = adapt(nnx_model(Listed))
    dora.check_base(adapted)
    nnx.update(adapted, nnx.state(nnx_model(Listed, 9), nnx.Param))
    assert np.all(np.any(np.isnan(run(adapted, inputs(5, WIDTH))), axis=-1))
    for function in (dora.check_base, dora.merge):
        with pytest.raises(
            dora.errors.AdapterError, match=r"head: the kernel changed since apply_dora"
        ):
            function(adapted)


def test_the_model_given_stays_as_it_is():
    model, x = nnx_model(Listed), inputs(5, WIDTH)
    before, y = base_state(model), run(model, x)
    adapted = train(adapt(model, modules_to_save=["head"]))
    assert type(model.layers[0].up) is nnx.Linear
    assert type(model.head.kernel) is nnx.Param
    assert nnx.graphdef(model) == nnx.graphdef(nnx_model(Listed))
    trained = run(adapted, x)
    merged = dora.merge(adapted)
    assert same(run(adapted, x), trained)
    assert same(base_state(model), before)
    assert same(run(model, x), y)
    assert nnx.graphdef(merged) == nnx.graphdef(model)


def test_layers_keep_their_class_and_attributes():
    model = nnx_model(Listed)
    adapted = adapt(model)
    assert isinstance(adapted, Listed)
    assert isinstance(adapted.head, nnx.Linear)
    assert type(adapted.head).__name__ == "DoRALinear"
    assert (adapted.head.in_features, adapted.head.use_bias) == (WIDTH, False)
    assert same(adapted.head.kernel[...], model.head.kernel[...])


def test_split_and_merge_give_back_the_adapted_model():
    adapted, x = train(adapt(nnx_model(Listed), dropout=0.5)), inputs(5, WIDTH)
    adapted.eval()
    graphdef, *states = nnx.split(adapted, dora.DoRAParam, ...)
    assert same(run(nnx.merge(graphdef, *states), x), run(adapted, x))
    assert len(jax.tree.leaves(states[0])) == 9
    assert same(run(nnx.clone(adapted), x), run(adapted, x))
    hash(graphdef)  # static under jit


def test_an_abstract_model_gives_the_shapes_of_a_real_one():
    real = adapt(nnx_model(Listed))
    abstract = adapt(nnx.eval_shape(lambda: Listed(nnx.Rngs(0))))
    assert nnx.graphdef(abstract) == nnx.graphdef(real)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(real)))
    leaves = nnx.to_pure_dict(nnx.state(abstract))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), leaves) == shapes
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(leaves))


@pytest.mark.rows(1)
@pytest.mark.parametrize("modules_to_save", [[], ["head"]])
def test_training_moves_adapters_and_saved_modules_only(modules_to_save):
    model = adapt(nnx_model(Listed), target_modules=["up"], modules_to_save=modules_to_save)
    optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)
    before, adapters_before = base_state(model), dora.get_adapters(model)
    x, target = inputs(5, WIDTH), inputs(5, 3, seed=4)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean(jnp.square(model(x) - target))

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
        optimizer.update(model, gradients)
        return value, gradients

    losses = []
    for _ in range(4):
        value, gradients = step(model, optimizer)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(gradients)}
    assert names == {"lora_a", "lora_b", "magnitude", *(["kernel"] if modules_to_save else [])}
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), dora.get_adapters(model), adapters_before
    )
    assert jax.tree.all(moved)
    after, head_before = base_state(model), before["head"]
    assert same(after["head"], head_before) == (not modules_to_save)
    assert same({**after, "head": head_before}, before)
    merged = base_state(dora.merge(model))
    assert same(merged["head"], after["head"])
    assert not same(merged["layers"], after["layers"])


@pytest.mark.full
def test_the_scan_of_a_stack_has_the_gradients_of_its_layers():
    adapted, x = train(adapt(nnx_model(Scanned))), inputs(5, WIDTH)

    @nnx.jit
    def gradients(model, x):
        def loss(model):
            return jnp.sum(jnp.sin(model(x)))

        return nnx.grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model)

    scanned = gradients(adapted, x)
    rematerialised = train(adapt(nnx_model(ScannedRemat)))
    for a, b in zip(
        jax.tree.leaves(scanned), jax.tree.leaves(gradients(rematerialised, x)), strict=True
    ):
        assert a.shape[0] == 3
        assert np.all(np.any(np.asarray(a) != 0, axis=tuple(range(1, a.ndim))))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_only_and_on_the_low_rank_branch_only():
    model, x = nnx_model(lambda rngs: NNXChain((64, 32), rngs=rngs)), inputs(5, 64)
    adapted = train(adapt(model, rank=8, dropout=0.25))
    first, second = run(adapted, x), run(adapted, x)
    assert not same(first, second)
    plain = train(adapt(model, rank=8))
    adapted.eval()
    assert same(run(adapted, x), run(plain, x))
    assert same(run(adapted, x), run(adapted, x))
    adapted.train()
    assert not same(run(adapted, x), run(plain, x))
    without_branch = dora.get_adapters(adapted)
    without_branch["layer_0"]["lora_b"] = jnp.zeros((8, 32))
    dora.set_adapters(adapted, without_branch)
    dora.set_adapters(plain, without_branch)
    assert same(run(adapted, x), run(plain, x))


def test_dropout_keeps_the_mean():
    model, x = nnx_model(lambda rngs: NNXChain((64, 32), rngs=rngs)), inputs(1, 64)
    adapted, plain = train(adapt(model, rank=8, dropout=0.25)), train(adapt(model, rank=8))
    many = run(adapted, jnp.broadcast_to(x, (20_000, 64)))
    error = np.abs(jnp.mean(many, 0) - run(plain, x)[0]) / jnp.std(many, 0)
    assert np.max(error) < 5 / np.sqrt(20_000)


def test_every_layer_of_a_stack_drops_its_own():
    """Three equal layers, stacked: the same input, other masks."""

    def alike(tree):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), tree)

    model, x = nnx_model(Vmapped), inputs(5, WIDTH)
    nnx.update(model, alike(nnx.state(model)))
    adapted = adapt(model, dropout=0.5)
    dora.set_adapters(adapted, alike(random_adapters(dora.get_adapters(adapted))))
    y = run(adapted, x)
    assert not same(y[0], y[1])
    assert not same(y[1], y[2])
    adapted.eval()
    y = run(adapted, x)
    np.testing.assert_allclose(y, alike(y), rtol=1e-6)


def test_the_keyword_and_the_positional_input_are_the_same():
    layer, x = train(adapt(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)))), inputs(5, WIDTH)
    assert same(layer(inputs=x), layer(x))


def test_a_layer_alone_is_a_model():
    layer = adapt(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, dora.get_adapters(layer)) == {
        "lora_a": (WIDTH, 2),
        "lora_b": (2, 3),
        "magnitude": (3,),
    }
    assert type(dora.merge(layer)) is nnx.Linear


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_promotion_of_dtypes_is_that_of_the_plain_layer(dtype):
    """Also where the product, the bias and the output are of three dtypes."""
    model = nnx.Linear(
        WIDTH,
        3,
        dtype=dtype,
        param_dtype=jnp.bfloat16,
        preferred_element_type=jnp.float32,
        bias_init=nnx.initializers.normal(),
        rngs=nnx.Rngs(0),
    )
    x = inputs(5, WIDTH, jnp.bfloat16)
    assert same(run(adapt(model), x), run(model, x))
