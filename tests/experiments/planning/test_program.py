"""The planned step: what is cut where, its operations, its memory, and its time."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dora_jax.decomposition import QuantizedKernel
from dora_jax.ops import cheap_ways_alone
from experiments.benchmarks.cases import llama
from experiments.benchmarks.steps import METHODS, make_program
from experiments.planning.collectives import Collective
from experiments.planning.compiler import Counts, read_memory
from experiments.planning.estimate import Memory, estimate_times, largest_batch, moved_bytes
from experiments.planning.operations import product_operations
from experiments.planning.program import (
    PlanError,
    Setting,
    bytes_of_each_device,
    parameter_specs,
    placed,
    trace_step,
)
from experiments.planning.report import Plan, text_of
from experiments.planning.slices import Device
from experiments.trainer.mesh import make_mesh, parse_mesh
from tests.experiments.tiny_models import LLAMA


def test_adapters_are_cut_as_their_kernels_are():
    case = llama(shape=LLAMA, rank=2, scan_layers=True)
    program = make_program(METHODS["dora"], case.abstract(), case.adapter, case.loss)
    specs = parameter_specs(program.trainable, program.frozen)
    up, down = (
        {path[-1]: spec for path, spec in specs.items() if path[-2] == name}
        for name in ("up_proj", "down_proj")
    )
    assert up == {
        "kernel": PartitionSpec(None, "fsdp", "tensor"),
        "lora_a": PartitionSpec(None, "fsdp", None),
        "lora_b": PartitionSpec(None, None, "tensor"),
        "magnitude": PartitionSpec(None, "tensor"),
        "base_norm": PartitionSpec(None, "tensor"),
        "base_first_row": PartitionSpec(None, "tensor"),
    }
    assert down["lora_a"] == PartitionSpec(None, "tensor", None)
    assert down["magnitude"] == PartitionSpec(None, "fsdp")
    assert not [path for path in specs if path[-1].startswith("base") and not specs[path]]


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_is_cut_as_the_kernels_are(base):
    setting = Setting(LLAMA, rank=2, base=base)
    mesh = make_mesh(parse_mesh(""))
    with jax.set_mesh(mesh):
        case = setting.case(mesh)
        program = make_program(METHODS["dora"], case.abstract(base), case.adapter, case.loss)
    specs = parameter_specs(program.trainable, program.frozen)
    over_four = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    frozen = placed(program.frozen, specs, over_four)
    layers, head = frozen["layers"], frozen["lm_head"]["kernel"].get_value()
    for name in ("gate_proj", "up_proj", "down_proj"):
        kernel = layers["mlp"][name]["kernel"].get_value()
        assert isinstance(kernel, QuantizedKernel) and kernel.format == base
        assert kernel.codes.sharding.spec == specs["layers", "mlp", name, "kernel"]
        assert kernel.scales.sharding.spec[1:] == (None, kernel.codes.sharding.spec[2])
    assert head.dtype == "bfloat16" and head.sharding.spec == PartitionSpec("fsdp", "tensor")
    up = layers["mlp"]["up_proj"]["kernel"]
    codes = {"nf4": 2 * 8 * 12 // 2, "int8": 2 * 8 * 12}  # of two layers of 16 x 24
    assert bytes_of_each_device(up) == codes[base] + 4 * 2 * 12


@pytest.mark.full
def test_a_quantised_base_has_the_operations_of_the_dequantised_one():
    mesh = make_mesh(parse_mesh(""))
    found = {
        base: product_operations(
            trace_step(Setting(LLAMA, tokens=64, rank=2, base=base), mesh, whole=False).jaxpr
        )
        for base in ("bf16", "nf4", "int8")
    }
    assert found["nf4"] == found["int8"] == pytest.approx(found["bf16"], rel=0.1)


@pytest.mark.full
def test_operations_are_those_that_xla_counts_where_no_loop_hides_them():
    case = llama(shape=dataclasses.replace(LLAMA, num_hidden_layers=1), length=64, rank=2)
    with cheap_ways_alone():
        program = make_program(METHODS["dora"], case.abstract(), case.adapter, case.loss)
        arrays = (program.trainable, program.frozen, program.opt_state, case.batch)
        traced = jax.jit(program.step).trace(*arrays)
        counted = traced.lower().cost_analysis()["flops"]
    found = product_operations(traced.jaxpr)
    assert 0.7 * counted < found < counted  # the others are elementwise, and many in a tiny model


def test_loops_and_devices_multiply_operations():
    mesh = AbstractMesh((4,), ("fsdp",), (AxisType.Auto,))

    def each(x):
        return jax.lax.scan(lambda y, _: (y @ y, None), x, None, length=3)[0]

    x = jax.ShapeDtypeStruct((8, 2), np.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.shard_map(each, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))
        found = product_operations(jax.make_jaxpr(run)(x))
    assert found == 4 * 3 * 2 * 2**3


def test_a_mesh_that_does_not_divide_an_array_is_refused_by_its_path():
    mesh = AbstractMesh((1, 3, 1), ("data", "fsdp", "tensor"))
    kernel = {"up_proj": {"kernel": jax.ShapeDtypeStruct((2, 16, 24), np.float32)}}
    specs = {("up_proj", "kernel"): PartitionSpec(None, "tensor", "fsdp")}
    found = placed(kernel, specs, mesh)["up_proj"]["kernel"]
    assert found.sharding.shard_shape(found.shape) == (2, 16, 8)
    specs = {("up_proj", "kernel"): PartitionSpec(None, "fsdp", "tensor")}
    with pytest.raises(PlanError, match=r"does not divide up_proj\.kernel, of shape \(2, 16, 24\)"):
        placed(kernel, specs, mesh)


def test_memory_is_read_from_xlas_allocations():
    places = """BufferAssignment:
allocation 0: size 1024, page 0, thread-local:
allocation 1: size 512, page 0, constant:
 value: <12 constant.1 @0> (size=512,offset=0): u32[]{:T(128)}
allocation 2: size 100, page 0, parameter 3, shape |bf16[2,25]| at ShapeIndex {}:
allocation 3: size 30, page 0, parameter 4, shape |f32[8]| at ShapeIndex {}, maybe-live-out:
allocation 4: size 4096, page 0, preallocated-temp:
allocation 5: size 9999, color 1, page 0, preallocated-temp:
"""
    assert read_memory(places) == Memory(arguments=130, temporaries=4096, other=512)


def test_a_step_takes_the_time_of_its_slowest_part_or_of_all():
    device = Device(16, 1e-12, 1e-9, 1e-9, "")  # one of each in a second
    gather = Collective("all-gather", (("u8", (4,)),), ("fsdp",), 2)
    times = estimate_times(device, 10, Memory(1, 2), [gather], {"fsdp": 4})
    assert (times.products, times.memory, times.network) == pytest.approx((10, 1 + 2 * (2 + 8), 6))
    assert (times.least, times.most) == pytest.approx((21, 37))


def test_a_ring_moves_all_but_a_devices_own_part():
    shapes, mesh = (("u8", (8,)),), {"fsdp": 2, "tensor": 4}
    kinds = {"all-gather": 6, "reduce-scatter": 6, "all-reduce": 12, "collective-permute": 8}
    for kind, sent in kinds.items():
        assert moved_bytes(Collective(kind, shapes, ("tensor",), 1), mesh) == sent
    assert moved_bytes(Collective("all-gather", shapes, ("fsdp", "tensor"), 1), mesh) == 7


def test_the_largest_batch_is_the_last_that_fits():
    assert largest_batch((1, 2), (3, 5), 9) == 4
    assert largest_batch((1, 2), (3, 5), 8.9) == 3
    assert largest_batch((1, 2), (3, 5), 2) == 0


def counted(total, collectives=()):
    """What might be counted in a program of so many bytes, a tenth of them weights."""
    memory = Memory(total // 10, total - total // 10)
    return Counts("TPU v5 lite", 2e12, memory, total // 10, 0, 0, 100, [*collectives], 0, "", 1.0)


def planned(total, other, **changes):
    setting = dataclasses.replace(Setting(LLAMA, rows=4), **changes)
    mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    return Plan("tiny", setting, "v5e:2x2", mesh, counted(total), other)


def test_a_report_says_whether_a_step_fits_and_what_to_change():
    gib = 2**30
    fits, refused = planned(8 * gib, (8, 15 * gib)), planned(30 * gib, (1, 9 * gib))
    assert fits.fits and fits.most_rows == 8
    assert "Memory of a device: fits" in text_of(fits) and "tokens/s" in text_of(fits)
    text = text_of(refused)
    assert not refused.fits and refused.times is None and refused.most_rows == 1
    for words in ("DOES NOT FIT", "--rows 1, and microbatches", "give them to fsdp"):
        assert words in text
    assert "--remat save_scaled" in text_of(planned(30 * gib, None, remat="none"))
    assert "weights, adapters and moments alone are too large" in text_of(planned(300 * gib, None))


@pytest.mark.full
def test_a_step_is_traced_for_a_mesh_with_all_devices_of_one_process():
    step = trace_step(Setting(LLAMA, tokens=8, rank=2), make_mesh(parse_mesh("")), whole=True)
    assert step.weights(make_mesh(parse_mesh("")))[16 * 24] == "bf16"
