"""Precomputing: the scale of every layer computed once, ahead of the calls that use it."""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import dora_jax as dora
from tests.support import reference
from tests.support.models import (
    FRONT_ENDS,
    NNXChain,
    inputs,
    nnx_model,
    random_adapters,
    same,
    structure,
)
from tests.support.operations import CHAIN, WIDTH, chain, stack
from tests.support.quick import quick_jit
from tests.support.selection import table

SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "not normalised": {"normalize": False},
    "plain LoRA": {"decompose": False},
    "magnitude alone in one layer": {"rank_pattern": {"layer_0": 0}},
    "PiSSA": {"init": "pissa"},
}
MICROBATCHES = 3
CONFIG = dora.DoRAConfig(rank=4)


@functools.cache
def chain_with(front_end, switch="default"):
    return chain(front_end, dora.DoRAConfig(**{"rank": 4, **SWITCHES[switch]}))


def precompute_here(operations):
    """Returns `apply` with the scales precomputed in the same function."""
    return lambda params, adapters, x: operations.apply(
        params, operations.precompute_scales(params, adapters), x
    )


@pytest.mark.rows(4)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_precomputing_changes_no_bit_of_the_output(front_end, switch):
    model, x = chain_with(front_end, switch), inputs(7, CHAIN[0])
    apply = jax.jit(model.apply)
    adapters = random_adapters(model.adapters)
    y = apply(model.params, adapters, x)
    precomputed = jax.jit(model.precompute_scales)(model.params, adapters)
    assert same(apply(model.params, precomputed, x), y)


@pytest.mark.rows(1)
@pytest.mark.parametrize("indices", [None, [0, 2]])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_precomputing_out_of_a_scan_changes_at_most_rounding(front_end, indices):
    """The scan's body, compiled without the norm, rounds `c h` another way, but for `c = 1`."""
    model = stack(front_end, dora.DoRAConfig(rank=4, layers_to_transform=indices))
    x, base, apply = inputs(7, WIDTH), jax.jit(model.base), jax.jit(precompute_here(model))
    assert same(apply(model.params, model.adapters, x), base(model.params, x))
    adapters = random_adapters(model.adapters)
    y = jax.jit(model.apply)(model.params, adapters, x)
    assert reference.relative_error(apply(model.params, adapters, x), y) <= 5e-7


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_scale_takes_the_place_of_the_magnitude(front_end):
    model = chain_with(front_end, "magnitude alone in one layer")
    precomputed = model.precompute_scales(model.params, random_adapters(model.adapters))
    assert {name: sorted(layer) for name, layer in precomputed.items()} == {
        "layer_0": ["scale"],
        "layer_1": ["lora_a", "lora_b", "scale"],
    }
    plain = chain_with(front_end, "plain LoRA")
    assert same(plain.precompute_scales(plain.params, plain.adapters), plain.adapters)


def mean_loss(apply, params, adapters, x, target):
    return jnp.mean(jnp.square(apply(params, adapters, x) - target))


def loss_over_microbatches(model, *, precompute):
    """Returns `(params, adapters, xs, targets) -> loss`, a scan over the leading axis."""

    def loss(params, adapters, xs, targets):
        held = model.precompute_scales(params, adapters) if precompute else adapters

        def step(total, batch):
            return total + mean_loss(model.apply, params, held, *batch), None

        return jax.lax.scan(step, 0.0, (xs, targets))[0] / len(xs)

    return loss


def microbatches():
    x, target = inputs(MICROBATCHES * 5, CHAIN[0]), inputs(MICROBATCHES * 5, CHAIN[-1], seed=4)
    return tuple(a.reshape(MICROBATCHES, 5, -1) for a in (x, target))


@pytest.mark.rows(1)
@pytest.mark.parametrize(
    ("front_end", "switch"),
    table(
        FRONT_ENDS,
        ["default", "PiSSA"],
        default=lambda front_end, switch: front_end == "linen" or switch == "default",
    ),
)
def test_the_gradient_over_precomputed_microbatches_is_that_of_the_whole_batch(front_end, switch):
    model, (xs, targets) = chain_with(front_end, switch), microbatches()
    adapters = random_adapters(model.adapters)
    split = quick_jit(jax.grad(loss_over_microbatches(model, precompute=True), 1))
    whole = quick_jit(jax.grad(functools.partial(mean_loss, model.apply), 1))
    found = split(model.params, adapters, xs, targets)
    x, target = (a.reshape(-1, a.shape[-1]) for a in (xs, targets))
    expected = whole(model.params, adapters, x, target)
    assert structure(found) == structure(adapters)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(np.asarray(b) != 0)
        assert reference.relative_error(a, b) <= 1e-6


def products(jaxpr, inside_scan=False):
    """Counts the products by the shapes of their operands, inside scans and outside of them.

    Not those that run only where a norm is short.
    """
    counts: collections.Counter = collections.Counter()
    factors = {"dot_general": slice(0, 2), "dora_rows_of_direction_transpose": slice(1, 3)}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "cond":
            continue
        if name in factors:
            shapes = tuple(sorted(v.aval.shape for v in equation.invars[factors[name]]))
            counts[inside_scan, shapes] += 1
        for inner in jaxprs_in_params(equation.params):
            counts += products(inner, inside_scan or name == "scan")
    return counts


def products_of_a_step(model, *, precompute):
    """Returns the products in the gradient over microbatches: in the scans' bodies, and outside."""
    gradient = jax.grad(loss_over_microbatches(model, precompute=precompute), 1)
    jaxpr = jax.make_jaxpr(gradient)(model.params, model.adapters, *microbatches())
    counts = products(jaxpr.jaxpr)
    inside, outside = (
        collections.Counter({shapes: n for (where, shapes), n in counts.items() if where == wanted})
        for wanted in (True, False)
    )
    return inside, outside


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_norm_is_evaluated_once_for_all_microbatches(front_end):
    """The products of the norm, forward and backward, are outside of the loop over microbatches.

    In the loop are those of LoRA, and no more.
    """
    lora, nothing = products_of_a_step(chain_with(front_end, "plain LoRA"), precompute=False)
    model = chain_with(front_end)
    inside, outside = products_of_a_step(model, precompute=True)
    assert lora and not nothing
    assert inside == lora
    assert outside[((24, 4), (24, 40))] and outside[((40, 4), (40, 17))]  # <A^T W0, B>
    inside, _ = products_of_a_step(model, precompute=False)
    assert inside > lora
    assert (inside - lora)[((4, 40), (24, 40))]  # what its gradient costs, in every microbatch


def gradient_of(model):
    return jax.grad(functools.partial(mean_loss, model.apply), 1)


@pytest.mark.full
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_multi_steps_accumulates_the_gradient_of_what_is_precomputed(front_end):
    """In a microbatch are the products of LoRA; the norm's are in the pull-back, once a step."""
    model, (xs, targets) = chain_with(front_end), microbatches()
    adapters = random_adapters(model.adapters)
    gradient = gradient_of(model)
    accumulate = optax.MultiSteps(optax.identity(), MICROBATCHES)
    scaled, pull_back = jax.vjp(lambda a: model.precompute_scales(model.params, a), adapters)
    state = accumulate.init(scaled)
    for x, target in zip(xs, targets, strict=True):
        assert not accumulate.has_updated(state)
        grads = quick_jit(gradient)(model.params, scaled, x, target)
        mean, state = accumulate.update(grads, state)
    assert accumulate.has_updated(state)
    (found,) = pull_back(mean)
    x, target = (a.reshape(-1, a.shape[-1]) for a in (xs, targets))
    expected = quick_jit(gradient)(model.params, adapters, x, target)
    assert structure(found) == structure(adapters)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert reference.relative_error(a, b) <= 1e-6
    if front_end == "nnx":  # whose `apply` precomputes once more here, for the structure
        return
    lora = chain_with(front_end, "plain LoRA")
    first = (xs[0], targets[0])
    of_lora = jax.make_jaxpr(gradient_of(lora))(lora.params, lora.adapters, *first)
    of_dora = jax.make_jaxpr(gradient)(model.params, scaled, *first)
    assert products(of_dora.jaxpr) == products(of_lora.jaxpr)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_frozen_inference_is_the_same_at_every_call(front_end):
    model, x = chain_with(front_end), inputs(7, CHAIN[0])
    adapters = random_adapters(model.adapters)
    first, second = (model.precompute_scales(model.params, adapters) for _ in range(2))
    assert same(first, second)
    calls = [jax.jit(lambda *args: model.apply(*args)) for _ in range(2)]  # compiled anew
    outputs = [call(model.params, h, x) for call in calls for h in (first, second)]
    assert all(same(y, outputs[0]) for y in outputs)


def test_precomputing_a_precomputed_model_changes_nothing():
    model = dora.apply_dora(
        nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs)), CONFIG, rngs=nnx.Rngs(1)
    )
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    once = dora.precompute_scales(model)
    assert same(dora.get_adapters(dora.precompute_scales(once)), dora.get_adapters(once))
    linen = chain_with("linen")
    once_linen = linen.precompute_scales(linen.params, random_adapters(linen.adapters))
    assert same(linen.precompute_scales(linen.params, once_linen), once_linen)


def test_the_model_that_is_precomputed_stays_as_it_is():
    model = dora.apply_dora(
        nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs)), CONFIG, rngs=nnx.Rngs(1)
    )
    before = dora.get_adapters(model)
    precomputed = dora.precompute_scales(model)
    assert same(dora.get_adapters(model), before)
    dora.set_adapters(model, random_adapters(before))
    assert np.all(np.asarray(dora.get_adapters(precomputed)["layer_0"]["scale"]) == 1)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_precomputed_adapters_merge_to_the_same_kernels(front_end):
    model = chain_with(front_end)
    adapters = random_adapters(model.adapters)
    merged = model.merge(model.params, model.precompute_scales(model.params, adapters))
    for name, layer in model.merge(model.params, adapters).items():
        assert reference.relative_error(merged[name]["kernel"], layer["kernel"]) <= 1e-6


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_precomputed_scale_is_not_trained(front_end):
    model = chain(front_end, dora.DoRAConfig(rank=4))
    precomputed = model.precompute_scales(model.params, model.adapters)
    with pytest.raises(dora.errors.AdapterError, match="precomputed scale"):
        dora.dora_optimizer(1e-3).init(precomputed)


def test_scales_alone_may_be_modules_trained_in_full_and_are_warned_of():
    """A normalisation layer in `modules_to_save` has a `scale` too; a tree does not say which."""
    model = chain("linen", dora.DoRAConfig(rank=0))
    precomputed = model.precompute_scales(model.params, model.adapters)
    with pytest.warns(UserWarning, match="no adapter among the parameters"):
        dora.dora_optimizer(1e-3).init(precomputed)


def test_nnx_optimizers_refuse_a_precomputed_model():
    model = dora.apply_dora(
        nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs)), CONFIG, rngs=nnx.Rngs(1)
    )
    with pytest.raises(
        dora.errors.AdapterError, match=r"layer_0.scale is a precomputed scale.*not trained"
    ):
        nnx.Optimizer(dora.precompute_scales(model), dora.dora_optimizer(1e-3), wrt=dora.DoRAParam)


def test_unprocessed_adapters_are_refused_by_a_precomputed_model():
    model = dora.apply_dora(
        nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs)), CONFIG, rngs=nnx.Rngs(1)
    )
    with pytest.raises(
        dora.errors.AdapterError, match=r"missing layer_0.scale.*unknown layer_0.mag"
    ):
        dora.set_adapters(dora.precompute_scales(model), dora.get_adapters(model))
    with pytest.raises(
        dora.errors.AdapterError, match=r"missing layer_0.magnitude.*unknown layer_0.sc"
    ):
        dora.set_adapters(model, dora.get_adapters(dora.precompute_scales(model)))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_precomputed_scale_of_another_base_is_nan(front_end):
    model, x = chain_with(front_end), inputs(7, CHAIN[0])
    other = jax.tree.map(lambda leaf: leaf + 1, model.params)
    precomputed = model.precompute_scales(other, model.adapters)
    assert np.all(np.isnan(precomputed["layer_0"]["scale"]))
    assert np.all(np.isnan(model.apply(other, precomputed, x)))
