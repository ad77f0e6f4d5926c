"""The optimiser on trees of arrays; `tests/laws/test_front_ends.py` takes its steps in models."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dora_jax as dora
from tests.support.models import structure

ADAPTERS = {
    "block": {
        "query": {
            "lora_a": jnp.array([[1.0], [2.0]]),
            "lora_b": jnp.array([[3.0]]),
            "magnitude": jnp.array([4.0]),
        },
        "up": {"magnitude": jnp.array([5.0])},
    },
    "head": {"kernel": jnp.array([[6.0]]), "bias": jnp.array([7.0])},
}
GRADIENTS = jax.tree.map(lambda x: 0.1 * x, ADAPTERS)


def sgd(learning_rate, weight_decay):
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(learning_rate))


def updates_of(tx, gradients=GRADIENTS, params=ADAPTERS, steps=1):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(gradients, state, params)
    return updates


def assert_groups(updates, of, lora_a, lora_b, magnitude, saved, rtol=1e-6):
    """Each group's update must be the tree `of` times a number."""
    query = updates["block"]["query"]
    expected = [
        (query["lora_a"], of["block"]["query"]["lora_a"], lora_a),
        (query["lora_b"], of["block"]["query"]["lora_b"], lora_b),
        (query["magnitude"], of["block"]["query"]["magnitude"], magnitude),
        (updates["block"]["up"]["magnitude"], of["block"]["up"]["magnitude"], magnitude),
        (updates["head"]["kernel"], of["head"]["kernel"], saved),
        (updates["head"]["bias"], of["head"]["bias"], saved),
    ]
    for found, base, factor in expected:
        np.testing.assert_allclose(found, factor * base, rtol=rtol)


def test_each_group_has_its_own_learning_rate():
    tx = dora.dora_optimizer(
        0.1, magnitude_lr_ratio=3.0, lora_b_lr_ratio=16.0, max_grad_norm=None, optimizer=sgd
    )
    assert_groups(updates_of(tx), GRADIENTS, -0.1, -1.6, -0.3, -0.1)


def test_by_default_the_magnitude_learns_three_times_as_fast():
    updates = updates_of(dora.dora_optimizer(1e-3))
    sizes = jax.tree.map(lambda u, p: u / jnp.sign(p), updates, ADAPTERS)  # Adam's first step
    ones = jax.tree.map(jnp.ones_like, ADAPTERS)
    assert_groups(sizes, ones, -1e-3, -1e-3, -3e-3, -1e-3, rtol=1e-5)


def test_the_magnitude_follows_a_schedule_at_its_ratio():
    schedule = optax.linear_schedule(0.0, 0.4, 4)
    tx = dora.dora_optimizer(
        schedule, magnitude_lr_ratio=5.0, lora_b_lr_ratio=2.0, max_grad_norm=None, optimizer=sgd
    )
    for step, rate in enumerate((0.0, 0.1, 0.2, 0.3, 0.4, 0.4), start=1):
        updates = updates_of(tx, steps=step)
        assert_groups(updates, GRADIENTS, -rate, -2 * rate, -5 * rate, -rate)


@pytest.mark.parametrize("rate", [0.5, optax.linear_schedule(0.5, 0.1, 4)])
def test_the_magnitude_may_have_a_schedule_of_its_own(rate):
    """A ratio that is a function of the step gives it any schedule: ratio times rate."""
    own = optax.join_schedules([optax.constant_schedule(0.7), optax.constant_schedule(0.2)], [2])
    at = rate if callable(rate) else lambda step: rate
    tx = dora.dora_optimizer(
        rate,
        magnitude_lr_ratio=lambda step: own(step) / at(step),
        max_grad_norm=None,
        optimizer=sgd,
    )
    for step, expected in enumerate((0.7, 0.7, 0.2)):
        updates = updates_of(tx, steps=step + 1)
        others = -float(at(step))
        assert_groups(updates, GRADIENTS, others, others, -expected, others)


@pytest.mark.parametrize("optimizer", [optax.adamw, sgd])
def test_the_magnitude_has_a_decay_of_its_own(optimizer):
    tx = dora.dora_optimizer(
        0.1,
        magnitude_lr_ratio=2.0,
        weight_decay=0.3,
        magnitude_weight_decay=0.05,
        optimizer=optimizer,
    )
    updates = updates_of(tx, jax.tree.map(jnp.zeros_like, GRADIENTS))
    assert_groups(updates, ADAPTERS, -0.03, -0.03, -0.01, -0.03)


def test_by_default_nothing_decays():
    updates = updates_of(dora.dora_optimizer(0.1), jax.tree.map(jnp.zeros_like, GRADIENTS))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("limit", [0.25, 1.0, 100.0, None])
def test_the_norm_that_is_clipped_is_of_all_groups_together(limit):
    tx = dora.dora_optimizer(0.5, magnitude_lr_ratio=3.0, max_grad_norm=limit, optimizer=sgd)
    norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(GRADIENTS))))
    assert 1.0 < norm < 100.0
    factor = -0.5 if limit is None else -0.5 * min(1.0, limit / norm)
    assert_groups(updates_of(tx), GRADIENTS, factor, factor, 3 * factor, factor)


def test_labels_are_the_names_of_the_arrays():
    assert dora.adapters.label_adapters(ADAPTERS) == {
        "block": {
            "query": {"lora_a": "lora_a", "lora_b": "lora_b", "magnitude": "magnitude"},
            "up": {"magnitude": "magnitude"},
        },
        "head": {"kernel": "saved", "bias": "saved"},
    }


def test_the_state_of_an_nnx_model_has_the_same_labels():
    model = nnx.Dict(up=nnx.Linear(3, 2, rngs=nnx.Rngs(0)), head=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=1, target_modules=["up"], modules_to_save=["head"])
    model = dora.apply_dora(model, config, rngs=nnx.Rngs(0))
    state = nnx.state(model, dora.DoRAParam)
    labels = dora.adapters.label_adapters(state)
    assert structure(labels) == structure(state)
    assert sorted(jax.tree.leaves(labels)) == ["lora_a", "lora_b", "magnitude", "saved", "saved"]
    assert jax.tree.leaves(labels) == jax.tree.leaves(
        dora.adapters.label_adapters(dora.get_adapters(model))
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"query": {"kernel": 0, "lora_a": 0, "lora_b": 0, "magnitude": 0}},
            "query.kernel is the frozen base of an adapted layer",
        ),
        (
            {"kernel": 0, "magnitude": 0},
            "kernel is the frozen base of an adapted layer.*wrt=DoRAParam in NNX",
        ),
    ],
)
def test_base_parameters_are_refused(tree, message):
    with pytest.raises(dora.errors.AdapterError, match=message):
        dora.adapters.label_adapters(tree)
    with pytest.raises(dora.errors.AdapterError, match=message):
        dora.dora_optimizer(1e-3).init(jax.tree.map(jnp.zeros, tree))


@pytest.mark.parametrize("wrt", [nnx.Param, (dora.DoRAParam, nnx.Param), ...])
def test_an_nnx_optimizer_of_base_parameters_is_refused(wrt):
    model = dora.apply_dora(
        nnx.Dict(up=nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
        dora.DoRAConfig(rank=1),
        rngs=nnx.Rngs(0),
    )
    wrt = nnx.Any(*wrt) if isinstance(wrt, tuple) else wrt
    with pytest.raises(dora.errors.AdapterError, match="wrt=DoRAParam"):
        nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=wrt)


HEAD_ALONE = {"head": ADAPTERS["head"]}


def test_modules_trained_in_full_need_no_adapter_next_to_them():
    """A tree of Linen's does not show whether it is the base's, so that is said."""
    tx = dora.dora_optimizer(0.1, max_grad_norm=None, optimizer=sgd)
    with pytest.warns(UserWarning, match="all of them are trained in full.*not params"):
        updates = updates_of(tx, {"head": GRADIENTS["head"]}, HEAD_ALONE)
    np.testing.assert_allclose(updates["head"]["bias"], -0.1 * GRADIENTS["head"]["bias"])
    assert dora.adapters.count_parameters(HEAD_ALONE)["total"] == 2
    model = nnx.Dict(up=nnx.Linear(3, 2, rngs=nnx.Rngs(0)), head=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    config = dora.DoRAConfig(target_modules=(), modules_to_save=["head"])
    model = dora.apply_dora(model, config, rngs=nnx.Rngs(0))
    with warnings.catch_warnings(action="error"):
        nnx.Optimizer(model, dora.dora_optimizer(0.1), wrt=dora.DoRAParam)
    with pytest.raises(dora.errors.AdapterError, match="wrt=DoRAParam"):
        nnx.Optimizer(model, dora.dora_optimizer(0.1), wrt=nnx.Param)


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": None},
        {"optimizer": sgd, "magnitude_lr_ratio": optax.linear_schedule(1.0, 3.0, 4)},
    ],
)
def test_hyperparameters_may_be_injected(options):
    static = ("optimizer",) if "optimizer" in options else ()
    tx = optax.inject_hyperparams(dora.dora_optimizer, static)(learning_rate=0.1, **options)
    expected = updates_of(dora.dora_optimizer(0.1, **options))
    state, update = tx.init(ADAPTERS), jax.jit(tx.update)
    updates, state = update(GRADIENTS, state, ADAPTERS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)
    state.hyperparams["learning_rate"] *= 0
    assert not any(map(np.any, jax.tree.leaves(update(GRADIENTS, state, ADAPTERS)[0])))


def test_an_optimizer_that_is_taken_for_a_schedule_is_named():
    tx = optax.inject_hyperparams(dora.dora_optimizer)(0.1, optimizer=optax.lion)
    with pytest.raises(dora.errors.ConfigError, match=r"optimizer must be .*static_args"):
        tx.init(ADAPTERS)


def test_an_empty_tree_is_no_error():
    """A partition of a model over pipeline stages may hold no adapter."""
    tx = dora.dora_optimizer(1e-3)
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_a_saved_module_may_name_its_parameters_as_it_likes():
    tree = {"query": {"magnitude": 0}, "head": {"saved": 0, "scale": 0}}
    assert dora.adapters.label_adapters(tree)["head"] == {"saved": "saved", "scale": "saved"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magnitude_lr_ratio": -1.0}, "magnitude_lr_ratio must be at least 0, got -1.0"),
        ({"lora_b_lr_ratio": -0.5}, "lora_b_lr_ratio must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"magnitude_weight_decay": -0.1}, "magnitude_weight_decay must be at least 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None, got 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(dora.errors.ConfigError, match=message):
        dora.dora_optimizer(1e-3, **options)
