"""What cuts the arrays of an adapted layer, from what cuts its kernel. Nothing is compiled."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dora_jax.config import DoRAConfig
from dora_jax.decomposition import KernelAxes, init_layer, quantize_kernel, quantized_shardings
from dora_jax.decomposition.quantize import Quantization
from dora_jax.decomposition.sharding import layer_entries, layer_shardings

RANK = 7
# The sizes of a kernel's axes are unique, so that an array's shape says which axes it has.
SIZES = (2, 4, 6, 8)
ENTRIES = ("layers", "fsdp", None, ("tensor", "data"))


def every_grouping():
    """Yields each way to share four axes among stack, in and out; there is an in axis."""
    for groups in itertools.product("sio", repeat=len(SIZES)):
        if "i" in groups:
            yield KernelAxes(
                *(tuple(i for i, g in enumerate(groups) if g == kind) for kind in "sio")
            )


def test_each_axis_of_an_array_has_the_entry_of_the_kernels_axis_that_it_is():
    cut = dict(zip(SIZES, ENTRIES, strict=True)) | {RANK: None}
    for axes in every_grouping():
        found = layer_entries(axes, ENTRIES)
        for name, shape in axes.shapes(SIZES, RANK).items():
            assert found[name] == tuple(cut[size] for size in shape)
        assert found["init_a"] == found["lora_a"] and found["init_b"] == found["lora_b"]
        assert {found[name] for name in ("norm", "first_row")} == {found["magnitude"]}
        assert found["scale"] == (*found["mask"], *(None,) * len(axes.outputs))
        assert found["mask"] == tuple(ENTRIES[i] for i in axes.stack)


def test_entries_that_are_left_out_cut_nothing():
    axes = KernelAxes((), (0,), (1,))
    assert layer_entries(axes, ("fsdp",)) == layer_entries(axes, ("fsdp", None))


@pytest.mark.parametrize("init", ["kaiming_uniform", "pissa"])
def test_an_abstract_kernels_sharding_is_that_of_its_abstract_adapter(init):
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    axes, config = KernelAxes((0,), (1,), (2,)), DoRAConfig(rank=2, init=init)
    own = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    kernel = jax.ShapeDtypeStruct((3, 8, 4), jnp.float32, sharding=own)
    settings = config.layer_settings(("up",))
    adapter, base = init_layer(config, settings, ("up",), jax.random.key(0), kernel, axes)
    wanted = layer_entries(axes, own.spec)
    for name, x in (adapter | base.arrays()).items():
        assert x.sharding == NamedSharding(mesh, P(*wanted[name]))


def test_a_kernel_on_no_mesh_says_nothing():
    axes = KernelAxes((), (0,), (1,))
    for kernel in (jnp.ones((4, 3)), jax.ShapeDtypeStruct((4, 3), jnp.float32)):
        assert layer_shardings(kernel, axes) is None


def test_codes_lie_as_the_kernel_and_fewer_scales_are_cut_where_they_can_be():
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    own = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    axes, kernel = KernelAxes((0,), (1,), (2,)), jax.ShapeDtypeStruct((3, 256, 6), jnp.bfloat16)

    def specs(*how, **more):
        quantized = quantize_kernel(kernel, Quantization(*how, **more), axes)
        found = quantized_shardings(quantized, own)
        assert found.codes == own
        return {
            name: (x.shape, tuple(getattr(found, name).spec))
            for name in ("scales", "scale_scales", "scale_mean")
            if (x := getattr(quantized, name)) is not None
        }

    whole = (None, None)
    assert specs("nf4") == {"scales": ((3, 4, 6), (None, "fsdp", "tensor"))}
    assert specs("nf4", 100) == {"scales": ((3, 3, 6), (*whole, "tensor"))}
    assert specs("int8") == {"scales": ((3, 1, 6), (*whole, "tensor"))}
    assert specs("nf4", double=True) == {
        "scales": ((3, 4, 6), (None, "fsdp", "tensor")),
        "scale_scales": ((3, 4, 1), (None, "fsdp", None)),
        "scale_mean": ((3, 1, 1), (*whole, None)),
    }
