"""Components of low-rank factors: how many are left, and what dropping the others keeps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import dora_jax as dora
from dora_jax.adapters.components import LowRank, count_stack_axes
from dora_jax.adapters.trees import nest
from dora_jax.decomposition import KernelAxes
from tests.support import reference
from tests.support.models import adapted_chain, inputs, random_adapters

STACK, IN, OUT = 3, 6, 5


def layer(live, seed=0, stack=()):
    """Returns factors and a magnitude whose row of B is zero where `live (*stack, r)` is False."""
    live, rng = np.asarray(live), np.random.default_rng(seed)
    rank = live.shape[-1]
    return {
        "lora_a": np.float32(rng.normal(size=(*stack, IN, rank))),
        "lora_b": np.float32(rng.normal(size=(*stack, rank, OUT)) * live[..., None]),
        "magnitude": np.float32(rng.normal(size=(*stack, OUT)) + 3),
    }


def tree():
    stacked = [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]
    return {
        "blocks": {"up": layer(stacked, 1, (STACK,))},
        "up": layer([0, 0, 0, 0], 3),
        "wider": {"up": layer([0, 1, 0, 0], 2)},
        "norm": {"magnitude": np.float32([1.0, 2.0])},
    }


@pytest.mark.parametrize(
    ("a", "b", "stack"),
    [
        ((6, 4), (4, 5), 0),
        ((3, 6, 4), (3, 4, 5), 1),
        ((2, 3, 6, 4), (2, 3, 4, 5), 2),
        ((3, 3, 6, 4), (4, 5), 0),  # a convolution
        ((6, 4), (4, 2, 5), 0),  # heads
        ((2, 6, 4), (4, 5), 0),
        ((3, 2, 6, 4), (3, 4, 5), 1),
    ],
)
def test_the_shapes_show_the_stack_axes(a, b, stack):
    factors = LowRank(np.zeros(a), np.zeros(b))
    assert count_stack_axes(("up",), factors) == stack


def test_where_the_shapes_do_not_show_the_stack_axes_they_are_asked_for():
    factors = LowRank(np.zeros((4, 6, 4)), np.zeros((4, 4, 5)))
    with pytest.raises(dora.errors.AdapterError, match=r"up: the shapes of lora_a .*: pass axes"):
        count_stack_axes(("up",), factors)
    axes = {("up",): KernelAxes((0,), (1,), (2,))}
    assert count_stack_axes(("up",), factors, axes) == 1


def test_ranks_are_of_every_layer_of_a_stack():
    expected = {"blocks.up": [2, 0, 3], "up": 0, "wider.up": 1}
    assert dora.adapters.component_ranks(tree()) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"blocks.up": 1.5}},
        {"rank": 7, "rank_pattern": {"up": 4, "norm": 0}},
        {"decompose": False},
    ],
    ids=str,
)
def test_compression_keeps_every_merged_kernel(fields):
    """Also where one layer's path ends in another's."""
    before, least = tree(), 0
    fields = {"rank": 4, "alpha": 6.0, **fields}
    if fields.get("decompose", True):
        config = dora.DoRAConfig(**{"rank_pattern": {"norm": 0}, **fields})
    else:
        config, least = dora.DoRAConfig(**fields), 1
        flat = dora.adapters.flatten(before)
        before = nest({path: x for path, x in flat.items() if path[-1] != "magnitude"})
    after, smaller = dora.adapters.compress(before, config)
    rng = np.random.default_rng(5)
    for path, shape, rank in (
        (("blocks", "up"), (STACK, IN, OUT), 3),
        (("wider", "up"), (IN, OUT), 1),
        (("up",), (IN, OUT), least),
    ):
        kernel = rng.normal(size=shape)
        old, new = dora.adapters.flatten(before), dora.adapters.flatten(after)
        assert smaller.layer_settings(path).rank == rank
        if rank:
            assert new[*path, "lora_a"].shape == (*shape[:-1], rank)
            assert new[*path, "lora_b"].shape == (*shape[:-2], rank, OUT)
        else:
            assert (*path, "lora_a") not in new
        found, expected = (
            merged(kernel, flat, path, c) for flat, c in ((new, smaller), (old, config))
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def merged(kernel, flat, path, config):
    """Returns the merged kernel in float64."""
    a, b, m = (flat.get((*path, name)) for name in ("lora_a", "lora_b", "magnitude"))
    if a is None:
        a, b = np.zeros((IN, 1)), np.zeros((1, OUT))
    scaling = config.layer_settings(path).scaling
    if m is None:
        return kernel + scaling * (np.float64(a) @ np.float64(b))
    return reference.merged(kernel, a, b, m, scaling)


@pytest.mark.full
def test_a_model_adapted_for_compressed_adapters_computes_what_it_did():
    widths = (7, 6, 5)
    config = dora.DoRAConfig(rank=4, alpha=8.0)
    large = adapted_chain("linen", config, widths)
    adapters = random_adapters(large.adapters)
    rows = {"layer_0": [1.0, 0.0, 0.0, 1.0], "layer_1": [0.0] * 4}
    for name, own in rows.items():
        b = adapters[name]["lora_b"] * jnp.array(own)[:, None]
        adapters[name] = {**adapters[name], "lora_b": b}
    smaller, own = dora.adapters.compress(adapters, config)
    small = adapted_chain("linen", own, widths)
    x = inputs(8, 7)
    before, after = large.apply(large.params, adapters, x), small.apply(small.params, smaller, x)
    assert {k: v["lora_a"].shape for k, v in smaller.items() if "lora_a" in v} == {
        "layer_0": (7, 2)
    }
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_boxes_around_adapter_arrays_are_kept():
    own = layer([1, 0, 1])
    boxed = {"up": {k: linen.Partitioned(jnp.asarray(x), (None,) * x.ndim) for k, x in own.items()}}
    smaller, _ = dora.adapters.compress(boxed, dora.DoRAConfig(rank=3))
    assert {k: type(x) for k, x in smaller["up"].items()} == dict.fromkeys(own, linen.Partitioned)
    np.testing.assert_array_equal(smaller["up"]["lora_b"].value, own["lora_b"][[0, 2]])


def test_what_cannot_be_compressed_is_refused():
    adapters = {"up": layer([1, 0])}
    with pytest.raises(dora.errors.AdapterError, match="up: the adapters have rank 2"):
        dora.adapters.compress(adapters, dora.DoRAConfig(rank=4))
    with pytest.raises(dora.errors.AdapterError, match=r"init='pissa'.*merge them"):
        dora.adapters.compress(adapters, dora.DoRAConfig(rank=2, init="pissa"))
    alone = {"up": {"lora_a": adapters["up"]["lora_a"]}}
    with pytest.raises(dora.errors.AdapterError, match="up has no lora_b"):
        dora.adapters.component_ranks(alone)
