"""Boxes around the adapters of a Linen model, as around its kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from tests.support.models import draw_parameters, same
from tests.support.quick import quick_jit

X = jnp.ones((3, 8))
BOXES = {
    "Partitioned": nn.with_partitioning,
    "LogicallyPartitioned": nn.with_logical_partitioning,
}


class Layers(nn.Module):
    """Two layers in a scan, and a head."""

    box: str

    @nn.compact
    def __call__(self, x):
        make = BOXES[self.box]

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                init = make(nn.initializers.ones_init(), ("embed", "mlp"))
                return nn.tanh(nn.Dense(8, kernel_init=init, name="up")(x)), None

        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.meta.PARTITION_NAME: "layers"},
        )
        x = stack(name="layers")(x, None)[0]
        init = make(nn.initializers.ones_init(), ("embed", "vocab"))
        return nn.Dense(4, kernel_init=init, name="head")(x)


def adapted(box, params=None):
    module = Layers(box)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    params = draw_parameters(shapes) if params is None else params(shapes)
    config = dora.DoRAConfig(rank=2, modules_to_save=("head",))
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(1), inputs=(X,)
    )
    return model, params, adapters


def names(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree, nn.meta.is_axis_metadata)[0]
    return {jax.tree_util.keystr(path[-1:]): getattr(box, "names", None) for path, box in flat}


@pytest.mark.parametrize("box", BOXES)
def test_adapters_and_moments_are_boxed_as_their_kernel(box):
    model, _, adapters = adapted(box, params=lambda shapes: shapes)
    layer = adapters["layers"]["up"]
    assert {type(x).__name__ for x in layer.values()} == {box}
    wanted = {
        "['lora_a']": ("layers", "embed", None),
        "['lora_b']": ("layers", None, "mlp"),
        "['magnitude']": ("layers", "mlp"),
    }
    assert names(layer) == wanted
    assert names(model.base_collection["layers"]["up"])["['norm']"] == ("layers", "mlp")
    assert names(adapters["head"])["['kernel']"] == ("embed", "vocab")  # trained in full
    state = jax.eval_shape(optax.adam(1e-3).init, adapters)
    assert names(state[0].mu["layers"]) == wanted


def test_boxed_and_unboxed_adapters_compute_the_same(tmp_path):
    model, params, adapters = adapted("Partitioned")
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    plain, bare = nn.meta.unbox(params), nn.meta.unbox(adapters)

    @quick_jit
    def gradient(params, adapters):
        return jax.grad(lambda a: model.apply({"params": params, "dora": a}, X).sum())(adapters)

    gradients = gradient(params, adapters)
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)
    assert same(nn.meta.unbox(gradients), gradient(plain, bare))
    merged = dora.merge(model, params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert same(nn.meta.unbox(merged), dora.merge(model, plain, bare))
    off = dora.disabled_adapters(model, adapters)
    assert same(nn.meta.unbox(off), dora.disabled_adapters(model, bare))
    assert jax.tree.structure(off) == jax.tree.structure(adapters)
    precompute = quick_jit(lambda *trees: dora.precompute_scales(model, *trees))
    assert same(precompute(params, adapters), precompute(plain, bare))
    dora.save(tmp_path / "boxed", model, adapters)
    assert same(
        dora.load(tmp_path / "boxed", model.module, params=params, inputs=(X,))[1], adapters
    )


def test_a_checkpoint_of_boxed_adapters_and_moments_is_restored_boxed(tmp_path):
    model, _, adapters = adapted("Partitioned")
    tx = dora.dora_optimizer(1e-3)
    state = tx.init(adapters)
    with dora.Checkpoints(tmp_path, model.config) as checkpoints:
        moved = jax.tree.map(lambda x: x + 1, (adapters, state))
        checkpoints.save(1, *moved)
        restored = checkpoints.restore(adapters, state)
    assert same((restored.adapters, restored.state), moved)


def test_boxes_and_a_mesh_say_where_adapters_lie():
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    model, params, adapters = adapted("LogicallyPartitioned", params=lambda shapes: shapes)
    rules = (("embed", "fsdp"), ("mlp", "tensor"), ("layers", None), ("vocab", None))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(rules):
        places = dora.shardings(model, params)
    up = places["layers"]["up"]
    assert {name: own.spec for name, own in up.items()} == {
        "lora_a": P(None, "fsdp", None),
        "lora_b": P(None, None, "tensor"),
        "magnitude": P(None, "tensor"),
    }
    tx = dora.dora_optimizer(1e-3)
    state = jax.eval_shape(tx.init, nn.meta.unbox(adapters))
    for path, own in jax.tree_util.tree_flatten_with_path(dora.optimizer_shardings(state, places))[
        0
    ]:
        tail = [str(getattr(key, "key", "")) for key in path][-3:]
        moment = "layers" in tail and tail[-1] in up
        assert own == (up[tail[-1]] if moment else NamedSharding(mesh, own.spec))
        assert moment or own.spec in (P(), places["head"]["kernel"].spec)
