"""Adapter trees: counted, read out, put back, refused if they are of another model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import dora_jax as dora
from dora_jax.adapters import check_shapes, flatten, tree_shapes
from tests.support import models
from tests.support.models import FRONT_ENDS, NNXChain, adapted_chain, inputs, same

CONFIG = dora.DoRAConfig(rank=4, rank_pattern={"layer_1": 0}, modules_to_save=["layer_2"])
WIDTHS = (16, 16, 16, 16)
random_adapters = models.random_adapters


def adapted_nnx() -> NNXChain:
    return dora.apply_dora(NNXChain(WIDTHS, rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_both_front_ends_make_the_same_tree(front_end):
    assert tree_shapes(adapted_chain(front_end, CONFIG, WIDTHS).adapters) == {
        ("layer_0", "lora_a"): (16, 4),
        ("layer_0", "lora_b"): (4, 16),
        ("layer_0", "magnitude"): (16,),
        ("layer_1", "magnitude"): (16,),
        ("layer_2", "bias"): (16,),
        ("layer_2", "kernel"): (16, 16),
    }


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_parameters_are_counted_by_group(front_end):
    assert dora.adapters.count_parameters(adapted_chain(front_end, CONFIG, WIDTHS).adapters) == {
        "lora_a": 64,
        "lora_b": 64,
        "magnitude": 32,
        "saved": 272,
        "total": 432,
    }


def test_abstract_trees_are_counted_too():
    tree = {"query": {"lora_a": jax.ShapeDtypeStruct((4096, 16), jnp.float32)}}
    assert dora.adapters.count_parameters(tree)["total"] == 65536


def test_an_adapter_tree_survives_being_put_into_a_model():
    model, x = adapted_nnx(), inputs(5, 16)
    adapters = random_adapters(dora.get_adapters(model))
    before = model(x)
    dora.set_adapters(model, adapters)
    assert np.any(np.asarray(model(x) != before))
    assert same(dora.get_adapters(model), adapters)


def test_setting_adapters_keeps_the_models_dtype_and_base():
    model = adapted_nnx()
    base = nnx.to_pure_dict(nnx.state(model, nnx.Param))["layer_0"]
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), dora.get_adapters(model))
    dora.set_adapters(model, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(dora.get_adapters(model))} == {
        jnp.dtype("float32")
    }
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))["layer_0"]
    assert same(after, base)


def without(tree, *path):
    """Returns nested dicts without the entry at a path."""
    key, *rest = path
    if rest:
        return {**tree, key: without(tree[key], *rest)}
    return {k: v for k, v in tree.items() if k != key}


CHANGES = {
    "no magnitude": (
        lambda tree: without(tree, "layer_0", "magnitude"),
        "missing layer_0.magnitude",
    ),
    "no layer": (lambda tree: without(tree, "layer_1"), "missing layer_1.magnitude"),
    "no saved module": (lambda tree: without(tree, "layer_2"), "missing layer_2.bias"),
    "another layer": (
        lambda tree: {**tree, "layer_9": tree["layer_0"]},
        "unknown layer_9.lora_a",
    ),
    "another array": (
        lambda tree: {**tree, "layer_1": {**tree["layer_1"], "lora_b": np.ones((4, 16))}},
        "unknown layer_1.lora_b",
    ),
    "another rank": (
        lambda tree: {**tree, "layer_0": {**tree["layer_0"], "lora_a": np.ones((16, 2))}},
        r"layer_0.lora_a has shape \(16, 2\), the model needs \(16, 4\)",
    ),
    "another input width": (
        lambda tree: {**tree, "layer_0": {**tree["layer_0"], "lora_a": np.ones((1, 4))}},
        r"layer_0.lora_a has shape \(1, 4\), the model needs \(16, 4\)",
    ),
    "another output width": (
        lambda tree: {**tree, "layer_1": {"magnitude": np.ones(1)}},
        r"layer_1.magnitude has shape \(1,\), the model needs \(16,\)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_of_another_model_are_refused_and_nothing_is_set(change):
    make, message = CHANGES[change]
    model = adapted_nnx()
    before = dora.get_adapters(model)
    with pytest.raises(dora.errors.AdapterError, match=message):
        dora.set_adapters(model, make(random_adapters(before)))
    assert same(dora.get_adapters(model), before)


@pytest.mark.parametrize("change", CHANGES)
def test_linen_refuses_adapters_of_another_model(change):
    make, message = CHANGES[change]
    chain = adapted_chain("linen", CONFIG, WIDTHS)
    wrong = make(chain.adapters)
    with pytest.raises(dora.errors.AdapterError, match=message):
        chain.apply(chain.params, wrong, inputs(5, 16))
    with pytest.raises(dora.errors.AdapterError, match=message):
        chain.merge(chain.params, wrong)


def test_every_problem_is_named_at_once():
    with pytest.raises(dora.errors.AdapterError) as caught:
        check_shapes({"b": np.ones(2), "c": np.ones(1)}, {("a",): (1,), ("b",): (3,)})
    assert str(caught.value) == (
        "the adapters are of another model: missing a; unknown c; "
        "b has shape (2,), the model needs (3,)"
    )


def test_flatten_reads_frozen_dictionaries_too():
    tree = {"block": {"query": {"magnitude": 1.0, "lora_a": 2.0}}}
    expected = {("block", "query", "lora_a"): 2.0, ("block", "query", "magnitude"): 1.0}
    assert flatten(tree) == expected
    assert flatten(freeze(tree)) == expected


@jax.tree_util.register_pytree_with_keys_class
class Pair(tuple):
    """A node whose keys, a number and a string, look the same."""

    def tree_flatten_with_keys(self):
        return tuple(zip(map(jax.tree_util.DictKey, (0, "0")), self, strict=True)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(dora.errors.AdapterError, match=r"two leaves layer\.0: rename one"):
        flatten({"layer": Pair((1, 2))})
