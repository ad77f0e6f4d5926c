"""Layers in a stack and numbered layers have the same PEFT files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dora_jax as dora
from dora_jax.adapters.trees import flatten, nest
from dora_jax.names import NameMap
from dora_jax.peft import PeftError, load_pretrained, read_adapters, save_pretrained
from tests.peft.small_models import (
    STACKED,
    Stack,
    Unstacked,
    adapted,
    assert_trees_equal,
    edit_config,
    edit_tensors,
    fields_of,
    index,
    plain,
)
from tests.support.checkpoints import filled


def test_a_stack_and_numbered_layers_have_the_same_files(tmp_path):
    stacked = adapted(Stack)
    save_pretrained(stacked, tmp_path, STACKED)
    tree, _ = read_adapters(plain(Unstacked), tmp_path, STACKED)
    own = dora.get_adapters(stacked)["layers"]
    for i in range(3):
        assert_trees_equal(tree["layers"][str(i)], index(own, i))
    again, _ = read_adapters(plain(Stack), tmp_path, STACKED)
    assert_trees_equal(again["layers"], own)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(nn.Dense(8, name="up")(x))
        return nn.Dense(5, name="down")(y), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        split = {"params": True}
        scanned = nn.scan(LinenMLP, variable_axes={"params": 0}, split_rngs=split, length=3)
        return scanned(name="layers")(x, None)[0]


class LinenUnstacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = LinenMLP(name=f"layers_{i}")(x)
        return x


@pytest.mark.full
def test_linen_models_scanned_and_not_have_the_same_files(tmp_path):
    names = NameMap({f"layers.{{i}}.{n}": f"layers.{{i}}.{n}" for n in ("up", "down")})
    numbered = NameMap({f"layers_{{i}}.{n}": f"layers.{{i}}.{n}" for n in ("up", "down")})
    random = np.random.default_rng(0)

    def draw(tree):
        return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), tree)

    x = jnp.ones((2, 5))
    params = draw(jax.eval_shape(LinenStack().init, jax.random.key(0), x)["params"])
    model, tree = dora.apply_dora(
        LinenStack(),
        dora.DoRAConfig(rank=2),
        params=dora.model.abstract(params),
        rng=jax.random.key(1),
        inputs=(x,),
    )
    tree = draw(tree)
    save_pretrained(model, tmp_path, names, adapters=tree)
    slices = {f"layers_{i}": index(params["layers"], i) for i in range(3)}
    other, other_tree = load_pretrained(
        LinenUnstacked(), tmp_path, numbered, params=slices, inputs=(x,)
    )
    for i in range(3):
        assert_trees_equal(other_tree[f"layers_{i}"], index(tree["layers"], i))
    again, again_tree = load_pretrained(
        LinenStack(), tmp_path, names, params=params, inputs=dora.linen.ExampleCall((x,))
    )
    assert_trees_equal(again_tree, tree)
    y = jax.jit(again.apply)({"params": params, "dora": tree}, x)
    other_y = jax.jit(other.apply)({"params": slices, "dora": other_tree}, x)
    np.testing.assert_allclose(other_y, y, rtol=1e-5)
    read, _ = read_adapters(model, tmp_path, names, params=params)
    assert_trees_equal(read, tree)
    scales = {p: x for p, x in flatten(tree).items() if p[-1] != "magnitude"} | {
        (*p[:-1], "scale"): x for p, x in flatten(tree).items() if p[-1] == "magnitude"
    }
    with pytest.raises(PeftError, match=r"layers.* holds a precomputed scale"):
        save_pretrained(model, tmp_path, names, adapters=nest(scales))


def test_a_part_of_a_stack_is_read_as_layers_to_transform(tmp_path):
    model = adapted(Stack, layers_to_transform=[0, 2])
    save_pretrained(model, tmp_path, STACKED)
    assert len(fields_of(tmp_path)["target_modules"]) == 4
    again = load_pretrained(filled(Stack), tmp_path, STACKED)
    for name in ("up", "down"):
        layer, own = getattr(again.layers, name), getattr(model.layers, name)
        np.testing.assert_array_equal(layer.base_mask[...], [True, False, True])
        for parameter in ("lora_a", "lora_b", "magnitude"):
            values = [np.asarray(getattr(x, parameter)[...])[[0, 2]] for x in (layer, own)]
            np.testing.assert_array_equal(*values)
    # Numbered layers need no such setting to hold any others.
    drop = [f"base_model.model.layers.2.up.{p}" for p in ("lora_A.weight", "lora_B.weight")]
    drop.append("base_model.model.layers.2.up.lora_magnitude_vector")
    edit_tensors(tmp_path, lambda t: [t.pop(key) for key in drop])
    names = [f"layers.{i}.{n}" for i, n in ((0, "up"), (0, "down"), (2, "down"))]
    edit_config(tmp_path, target_modules=names)
    _, config = read_adapters(plain(Unstacked), tmp_path, STACKED)
    assert sorted(config.target_modules) == sorted(names)
    with pytest.raises(PeftError, match=r"other layers of one stack.*not stacked"):
        read_adapters(plain(Stack), tmp_path, STACKED)


def test_layers_of_a_stack_with_several_ranks_need_numbered_layers(tmp_path):
    model = adapted(Unstacked, rank_pattern={"1.up": 3}, target_modules="layers.*up")
    save_pretrained(model, tmp_path, STACKED)
    _, config = read_adapters(plain(Unstacked), tmp_path, STACKED)
    assert config.layer_settings(("layers", "1", "up")).rank == 3
    with pytest.raises(PeftError, match=r"layers.up is a stack .*\(2, 16.0\), \(3, 16.0\)"):
        read_adapters(plain(Stack), tmp_path, STACKED)
