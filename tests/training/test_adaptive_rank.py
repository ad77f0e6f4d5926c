"""Adaptive rank on trees of arrays: a budget that layers share, kept exactly, in one program."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import dora_jax as dora
from dora_jax.training import adaptive_rank, component_scores, orthogonality_penalty
from tests.support.models import nnx_model
from tests.support.reference import wide

STACK, IN, OUT, RANK = 2, 5, 6, 3
COMPONENTS = (STACK + 1 + 1) * RANK
LAYERS = {("blocks", "up"): (STACK,), ("down",): (), ("last", "up"): ()}
BEGIN, END, STEPS, BUDGET = 2, 9, 12, 4
RATE = 0.01


def adapters(dtype=jnp.float32, seed=0):
    """Returns a tree with a stack, a layer without factors and a module trained in full."""
    rng = np.random.default_rng(seed)

    def layer(stack):
        shapes = {"lora_a": (*stack, IN, RANK), "lora_b": (*stack, RANK, OUT)}
        shapes["magnitude"] = (*stack, OUT)
        return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}

    return {
        "blocks": {"up": layer((STACK,))},
        "down": layer(()),
        "last": {"up": layer(())},
        "norm": {"magnitude": jnp.ones(4, dtype)},
        "head": {"kernel": jnp.ones((2, 3), dtype)},
    }


def loss(tree, target):
    flat, wanted = dora.adapters.flatten(tree), dora.adapters.flatten(target)
    apart = [
        flat[*path, "lora_a"] @ flat[*path, "lora_b"]
        - wanted[*path, "lora_a"] @ wanted[*path, "lora_b"]
        for path in LAYERS
    ]
    apart += [flat[path] - wanted[path] for path in flat if path[-1] in ("magnitude", "kernel")]
    return sum(jnp.sum(jnp.square(d)) for d in apart)


class Step(NamedTuple):
    before: dict
    gradients: dict
    state: object
    after: dict


def run(interval):
    """Returns every update of a run, and how many programs its step was compiled to."""
    tx = adaptive_rank(optax.sgd(RATE), BUDGET, begin=BEGIN, end=END, interval=interval)

    @jax.jit
    def step(tree, state):
        gradients = jax.grad(loss)(tree, adapters(seed=1))
        updates, state = tx.update(gradients, state, tree)
        return Step(tree, gradients, state, optax.apply_updates(tree, updates))

    tree = adapters()
    state, steps = tx.init(tree), []
    for _ in range(STEPS):
        steps.append(step(tree, state))
        tree, state = steps[-1].after, steps[-1].state
    return steps, step._cache_size()


@pytest.fixture(scope="module", params=[1, 3])
def recorded(request):
    return request.param, *run(request.param)


def live(tree):
    """Returns which rows of B are not zero, by layer."""
    flat = dora.adapters.flatten(tree)
    return {path: np.any(np.asarray(flat[*path, "lora_b"]) != 0, axis=-1) for path in LAYERS}


def selects(update, interval):
    return BEGIN <= update <= END and ((update - BEGIN) % interval == 0 or update == END)


def budget_at(update):
    """Returns the cubic schedule, rounded, in float64."""
    part = np.clip((update - BEGIN) / (END - BEGIN), 0, 1)
    return int(np.floor(BUDGET + (COMPONENTS - BUDGET) * (1 - part) ** 3 + 0.5))


def test_the_budget_is_exact_and_the_step_is_compiled_once(recorded):
    interval, steps, programs = recorded
    assert programs == 1
    seen = []
    for update, step in enumerate(steps, start=1):
        left = sum(own.sum() for own in live(step.after).values())
        if selects(update, interval):
            seen.append(left)
            assert left == budget_at(update)
        elif update < END:
            assert left == COMPONENTS  # all rows are trained between two selections
        else:
            assert left == BUDGET
    assert seen[0] == COMPONENTS
    assert seen[-1] == BUDGET
    assert len(set(seen)) > 2
    for step in steps[END - 1 :]:
        for path, own in live(step.after).items():
            np.testing.assert_array_equal(own, live(steps[-1].after)[path])


def test_scores_and_choices_are_those_of_the_paper(recorded):
    """AdaLoRA's section 3.2 in float64, from the recorded adapters and gradients."""
    interval, steps, _ = recorded
    mean, spread, left = {}, {}, None
    for update, step in enumerate(steps, start=1):
        weights, slopes = map(dora.adapters.flatten, (step.before, step.gradients))
        scores = {}
        for path in LAYERS:
            for name, axis in (("lora_a", -2), ("lora_b", -1)):
                key = (*path, name)
                now = np.abs(np.multiply(*wide(weights[key], slopes[key])))
                mean[key] = 0.85 * mean.get(key, 0) + 0.15 * now
                spread[key] = 0.85 * spread.get(key, 0) + 0.15 * np.abs(now - mean[key])
                scores[path] = scores.get(path, 0) + (mean[key] * spread[key]).mean(axis)
        found = component_scores(step.state)
        assert found.keys() == scores.keys()
        for path, own in scores.items():
            np.testing.assert_allclose(found[path], own, rtol=2e-4, atol=1e-9)
        if selects(update, interval):
            every = np.concatenate([own.ravel() for own in scores.values()])
            least = np.sort(every)[-budget_at(update)]
            left = {path: own >= least for path, own in scores.items()}
            for path, own in live(step.after).items():
                np.testing.assert_array_equal(own, left[path])
    assert left is not None


def test_all_but_the_dropped_rows_is_as_the_optimiser_makes_it(recorded):
    _, steps, _ = recorded
    for step in steps:
        before, slopes, after = map(
            dora.adapters.flatten, (step.before, step.gradients, step.after)
        )
        for path, x in after.items():
            w, g = wide(before[path], slopes[path])
            expected = w - RATE * g
            if path[-1] == "lora_b":
                expected *= live(step.after)[path[:-1]][..., None]
            np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def three_components(slopes):
    """Returns gradients of one layer `lora_a (4, 3)`, `lora_b (3, 2)`, alike in each component."""
    of_a, of_b = np.ones((4, 1)) * slopes, np.ones((1, 2)) * np.reshape(slopes, (3, 1))
    return {"lora_a": np.float32(of_a), "lora_b": np.float32(of_b)}


def test_a_component_that_was_dropped_may_come_back_until_the_end():
    tx = adaptive_rank(optax.sgd(0.1), 1, begin=0, end=8, interval=4, decays=(0.5, 0.5))

    @jax.jit
    def step(tree, state, slopes):
        updates, state = tx.update(slopes, state, tree)
        return optax.apply_updates(tree, updates), state

    tree = {"lora_a": np.ones((4, 3), np.float32), "lora_b": np.ones((3, 2), np.float32)}
    state, rows = tx.init(tree), []
    for update in range(1, 13):
        # First the last component matters, then the first one, and when it is too late the second.
        slopes = [0.01, 0.1, -3.0] if update <= 4 else [-5.0, 0.001, 0.001]
        slopes = [0.001, 9.0, 0.001] if update > 8 else slopes
        tree, state = step(tree, state, three_components(slopes))
        rows.append(np.any(np.asarray(tree["lora_b"]) != 0, axis=1).tolist())
    assert rows[3] == [False, False, True]  # the schedule has 1 + 2 (1 - 4/8)^3 = 1.25
    assert rows[4] == [True, True, True]
    assert rows[7] == [True, False, False]
    assert rows[8:] == [rows[7]] * 4


def first_update(tx, gradients, tree):
    """Returns the adapters after one update."""

    @jax.jit
    def updated(gradients, tree):
        return optax.apply_updates(tree, tx.update(gradients, tx.init(tree), tree)[0])

    return updated(gradients, tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_equal_scores_exactly_as_many_stay_as_the_budget_allows(dtype):
    tree = adapters(dtype)
    tx = adaptive_rank(optax.sgd(0.1), 5, begin=0, end=1)
    after = first_update(tx, jax.tree.map(np.zeros_like, tree), tree)
    assert sum(own.sum() for own in live(after).values()) == 5
    assert live(after)["blocks", "up"].sum() == 5  # the first of the tree
    assert all(
        x.dtype == y.dtype for x, y in zip(*map(jax.tree.leaves, (tree, after)), strict=True)
    )


def test_layers_that_are_left_out_neither_count_nor_change():
    tree = adapters()
    labels = {key: "frozen" if key == "blocks" else "trained" for key in tree}
    tx = optax.multi_transform(
        {
            "trained": adaptive_rank(optax.sgd(0.1), 2, begin=0, end=1),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    after = first_update(tx, jax.tree.map(np.ones_like, tree), tree)
    left = {path: own.sum() for path, own in live(after).items()}
    assert left["blocks", "up"] == STACK * RANK
    assert left["down",] + left["last", "up"] == 2
    np.testing.assert_array_equal(after["blocks"]["up"]["lora_b"], tree["blocks"]["up"]["lora_b"])


def test_the_state_lies_on_a_mesh_as_the_adapters_do():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("fsdp")
    tree = adapters()
    places = jax.tree.map(lambda _: NamedSharding(mesh, spec), tree)
    tx = adaptive_rank(optax.sgd(0.1), 2, begin=0, end=1)
    found = dora.optimizer_shardings(jax.eval_shape(tx.init, tree), places)
    assert {own.spec for own in jax.tree.leaves((found.sensitivity, found.uncertainty))} == {spec}
    assert {own.spec for own in jax.tree.leaves((found.kept, found.count))} == {PartitionSpec()}


def test_an_nnx_optimizer_keeps_the_budget_too():
    model = nnx_model(lambda rngs: nnx.Dict(up=nnx.Linear(IN, OUT, rngs=rngs)))
    model = dora.apply_dora(model, dora.DoRAConfig(rank=4), rngs=nnx.Rngs(0))
    tx = adaptive_rank(optax.sgd(1.0), 2, begin=0, end=2)
    optimizer = nnx.Optimizer(model, tx, wrt=dora.DoRAParam)
    take = nnx.jit(lambda model, optimizer, slopes: optimizer.update(model, slopes))
    rng = np.random.default_rng(0)
    expected = dora.adapters.flatten(dora.get_adapters(model))
    for _ in range(3):
        state = nnx.state(model, dora.DoRAParam)
        slopes = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), state)
        for path, g in dora.adapters.flatten(nnx.to_pure_dict(slopes)).items():
            expected[path] = np.asarray(expected[path]) - g
        take(model, optimizer, slopes)
    found = dora.adapters.flatten(dora.get_adapters(model))
    left = np.any(np.asarray(found["up", "lora_b"]) != 0, axis=1)
    assert left.sum() == 2
    expected["up", "lora_b"] = expected["up", "lora_b"] * left[:, None]
    for path, x in found.items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-5, atol=1e-5)


def test_the_penalty_is_of_the_angles_between_columns_of_a():
    tree = adapters()
    tree["down"]["lora_a"] = np.asarray(tree["down"]["lora_a"]) * [1, 0, 1]  # a column of zeros
    expected = 0.0
    for path in LAYERS:
        (a,) = wide(dora.adapters.flatten(tree)[*path, "lora_a"])
        for own in a.reshape(-1, IN, RANK):
            squares = np.square(own).sum(0)
            unit = own / np.sqrt(np.where(squares > 0, squares, 1))
            cosines = unit.T @ unit
            expected += np.square(cosines - np.diag(np.diag(cosines))).sum()
    found, gradient = jax.jit(jax.value_and_grad(orthogonality_penalty))(tree)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "budget must be an integer of at least 1, got 0"),
        ({"budget": 2.0}, "budget must be an integer"),
        ({"begin": -1}, "begin must be an integer of at least 0"),
        ({"end": 0}, "end must be an integer of at least 1, got 0"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"decays": (0.5, 1.0)}, "decays must be two numbers in"),
        ({"budget": COMPONENTS + 1}, f"at most the number of components {COMPONENTS}, got"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(dora.errors.ConfigError, match=message):
        adaptive_rank(optax.sgd(0.1), **{"budget": 2, "begin": 0, "end": 1, **fields}).init(
            adapters()
        )


def test_trees_without_components_are_refused():
    tx = adaptive_rank(optax.sgd(0.1), 2, begin=0, end=1)
    with pytest.raises(dora.errors.AdapterError, match="no low-rank factors"):
        tx.init({"norm": adapters()["norm"]})
    with pytest.raises(dora.errors.AdapterError, match="down has no lora_a"):
        tx.init({"down": {"lora_b": jnp.ones((2, 3))}})
    tree = adapters()
    with pytest.raises(dora.errors.AdapterError, match="needs the adapters"):
        tx.update(tree, tx.init(tree))


@pytest.mark.full
def test_products_that_do_not_start_at_zero_are_refused():
    tx = adaptive_rank(optax.sgd(0.1), 2, begin=0, end=1)
    model = nnx_model(lambda rngs: nnx.Dict(up=nnx.Linear(IN, OUT, rngs=rngs)))
    model = dora.apply_dora(model, dora.DoRAConfig(rank=2, init="olora"), rngs=nnx.Rngs(0))
    with pytest.raises(dora.errors.AdapterError, match="up: its product does not start at zero"):
        tx.init(dora.get_adapters(model))
