"""What Flax is told of where an NNX model's adapters lie. The models are abstract."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora

MESH = AbstractMesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
EXPLICIT = AbstractMesh((2, 2), ("fsdp", "tensor"), (AxisType.Explicit,) * 2)
CONFIG = dora.DoRAConfig(rank=2)


def linear(rngs, **metadata):
    init = nnx.with_metadata(nnx.initializers.ones_init(), **metadata)
    return nnx.Linear(8, 4, kernel_init=init, rngs=rngs)


def adapted(make):
    """An abstract adapted model, whose kernels' names are not looked up in a mesh."""
    with nnx.use_eager_sharding(False):
        base = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1))


def specs(model):
    """The partition spec of each array that an adapted layer keeps, as Flax reads it."""
    kinds = nnx.Any(dora.DoRAParam, dora.nnx.BaseParam)
    state = nnx.get_partition_spec(nnx.state(model, kinds))
    return {path[-1]: own.get_value() for path, own in nnx.to_flat_state(state)}


def test_adapters_have_the_metadata_of_their_kernel():
    rules = (("embed", "fsdp"), ("mlp", "tensor"))
    model = adapted(lambda rngs: linear(rngs, out_sharding=("embed", "mlp"), sharding_rules=rules))
    assert specs(model) == {
        "lora_a": P("fsdp", None),
        "lora_b": P(None, "tensor"),
        "magnitude": P("tensor"),
        "base_norm": P("tensor"),
        "base_first_row": P("tensor"),
    }


@pytest.mark.parametrize("stack", [{}, {nnx.PARTITION_NAME: "layers"}], ids=["unnamed", "named"])
def test_a_stack_of_layers_is_cut_as_its_kernels(stack):
    def make(rngs):
        run = nnx.vmap(
            lambda rngs: linear(rngs, out_sharding=("fsdp", "tensor")), transform_metadata=stack
        )
        return run(rngs.split(3))

    first = "layers" if stack else None
    found = specs(adapted(make))
    assert found["lora_a"] == P(first, "fsdp", None)
    assert found["lora_b"] == P(first, None, "tensor")
    assert found["magnitude"] == found["base_norm"] == P(first, "tensor")


def test_the_state_of_an_optimizer_is_cut_as_the_adapters():
    model = adapted(lambda rngs: linear(rngs, out_sharding=("fsdp", "tensor")))
    optimizer = nnx.eval_shape(
        lambda model: nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=dora.DoRAParam), model
    )
    state = nnx.get_partition_spec(nnx.state(optimizer))
    moments = {path[-1]: own.get_value() for path, own in nnx.to_flat_state(state) if "mu" in path}
    assert moments == {k: specs(model)[k] for k in ("lora_a", "lora_b", "magnitude")}


def test_without_metadata_the_sharding_of_an_abstract_kernel_counts():
    base = nnx.eval_shape(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    own = NamedSharding(MESH, P("fsdp", "tensor"))
    base.kernel.set_value(jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=own))
    model = dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1), inputs=(jnp.ones((1, 8)),))
    assert model.lora_b.get_value().sharding.spec == P(None, "tensor")
    assert dora.shardings(model) == {
        "lora_a": NamedSharding(MESH, P("fsdp", None)),
        "lora_b": NamedSharding(MESH, P(None, "tensor")),
        "magnitude": NamedSharding(MESH, P("tensor")),
    }


@pytest.mark.parametrize("cut", [P("fsdp", "tensor"), P(("fsdp", "tensor"), None)])
def test_explicit_axes_type_check_wherever_a_kernel_is_cut(cut):
    """Gradients have the types of the adapters; so have what merging and precomputing make."""
    config = dora.DoRAConfig(rank=2, dropout=0.5)

    def run(kernel, x):
        base = nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0))
        base.kernel.set_value(kernel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))

        def loss(model):
            return jnp.sum(model(x, out_sharding=P("fsdp", "tensor")) ** 2)

        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
        scale = dora.precompute_scales(model).scale[...]
        return nnx.to_pure_dict(gradients), scale, dora.merge(model).kernel[...]

    def like(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(EXPLICIT, spec))

    with jax.sharding.use_abstract_mesh(EXPLICIT):
        gradients, scale, merged = jax.eval_shape(
            run, like((8, 4), cut), like((6, 8), P("fsdp", None))
        )
    assert gradients["lora_a"].sharding.spec == P(cut[0], None)
    assert gradients["lora_b"].sharding.spec == P(None, cut[1])
    assert gradients["magnitude"].sharding.spec == scale.sharding.spec == P(cut[1])
    assert merged.sharding.spec == cut
