"""Collectives are read from XLA's text: their loops, their groups, their bytes."""

from __future__ import annotations

import pytest

from experiments.planning.collectives import gathered_weights, read_collectives, totals

MESH = {"data": 1, "fsdp": 4, "tensor": 2}

# What XLA writes for a TPU, shortened: a loop over layers with a loop inside that gathers a kernel
# part by part, two parts a trip; a collective spread over fusions; a fusion that keeps a part of a
# sum; a kernel whose attributes have several lines.
TPU = """HloModule jit_step, is_scheduled=true

%spread.1 (p.1: pred[16]) -> pred[64] {
  %p.1 = pred[16]{0} parameter(0)
  %all-gather.1 = pred[64]{0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %start.1 = pred[64]{0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%spread.2 (p.2: pred[16]) -> pred[64] {
  %p.2 = pred[16]{0} parameter(0)
  ROOT %all-gather.2 = pred[64]{0} all-gather(%p.2), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%all-reduce-scatter.3 (p.3: bf16[8,16]) -> bf16[4,16] {
  %p.3 = bf16[8,16]{1,0} parameter(0)
  %all-reduce.3 = bf16[8,16]{1,0:T(8,128)(2,1)} all-reduce(%p.3), channel_id=8, \
replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %part.3 = bf16[4,16]{1,0} dynamic-slice(%all-reduce.3), dynamic_slice_sizes={4,16}
}

%inner_cond (s.4: (u32[], bf16[2,16])) -> pred[] {
  %s.4 = (u32[], bf16[2,16]{1,0}) parameter(0)
  %end.4 = u32[]{:T(128)} constant(4)
  %i.4 = u32[]{:T(128)} get-tuple-element(%s.4), index=0
  ROOT %less.4 = pred[] compare(%i.4, %end.4), direction=LT
}

%inner_body (s.5: (u32[], bf16[2,16])) -> (u32[], bf16[2,16]) {
  %s.5 = (u32[], bf16[2,16]{1,0}) parameter(0)
  %i.5 = u32[]{:T(128)} get-tuple-element(%s.5), index=0
  %two.5 = u32[]{:T(128)} constant(2)
  %x.5 = bf16[2,16]{1,0} get-tuple-element(%s.5), index=1
  %fusion.5 = pred[64]{0} fusion(%x.5), kind=kCustom, calls=%spread.2
  %permute-start.5 = (bf16[2,16]{1,0}, bf16[2,16]{1,0}, u32[], u32[]) collective-permute-start(\
%x.5), channel_id=9, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %permute.5 = bf16[2,16]{1,0} collective-permute-done(%permute-start.5)
  %next.5 = u32[]{:T(128)} add(%i.5, %two.5)
  ROOT %tuple.5 = (u32[]{:T(128)}, bf16[2,16]{1,0}) tuple(%next.5, %permute.5)
}

%outer_cond (s.6: (s32[], bf16[2,16])) -> pred[] {
  %s.6 = (s32[], bf16[2,16]{1,0}) parameter(0)
  %end.6 = s32[]{:T(128)} constant(3)
  %i.6 = s32[]{:T(128)} get-tuple-element(%s.6), index=0
  ROOT %less.6 = pred[] compare(%i.6, %end.6), direction=LT
}

%outer_body (s.7: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %s.7 = (s32[], bf16[2,16]{1,0}) parameter(0)
  %kernel.7 = bf16[2,16]{1,0} custom-call(%s.7), custom_call_target="tpu_custom_call", attributes={
 "metadata": {"block": 512
}}, metadata={op_name="attention"}
  %gather.7 = bf16[8,16]{1,0} all-gather(%kernel.7), channel_id=10, \
replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %async.7 = pred[64]{0} fusion(%kernel.7), kind=kCustom, calls=%spread.1
  %while.7 = (u32[], bf16[2,16]{1,0}) while(%s.7), condition=%inner_cond, body=%inner_body
  %scatter.7 = bf16[4,16]{1,0} fusion(%gather.7), kind=kCustom, calls=%all-reduce-scatter.3
  %one.7 = s32[]{:T(128)} constant(1)
  %i.7 = s32[]{:T(128)} get-tuple-element(%s.7), index=0
  %next.7 = s32[]{:T(128)} add(%i.7, %one.7)
  ROOT %tuple.7 = (s32[]{:T(128)}, bf16[2,16]{1,0}) tuple(%next.7, %kernel.7)
}

ENTRY %main (x: bf16[2,16]) -> f32[4] {
  %x = bf16[2,16]{1,0} parameter(0)
  %while.8 = (s32[], bf16[2,16]{1,0}) while(%x), condition=%outer_cond, body=%outer_body
  ROOT %sum.8 = (f32[4]{0}, f32[3,2]{1,0}) all-reduce(%while.8, %x), channel_id=11, \
replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""


@pytest.fixture(scope="module")
def found():
    return {one.kind + str(one.shapes[0][0]): one for one in read_collectives(TPU, MESH)}


def test_each_collective_counts_as_often_as_it_runs(found):
    assert {name: one.count for name, one in found.items()} == {
        "all-gatherpred": 3,  # once where it is started, not in each fusion that it is spread over
        "all-gatherbf16": 3,
        "collective-permutebf16": 3 * 2,
        "reduce-scatterbf16": 3,
        "all-reducef32": 1,
    }


def test_a_program_that_was_refused_has_none():
    assert read_collectives("", MESH) == []


def test_bytes_are_those_of_the_whole_arrays(found):
    assert {name: one.bytes for name, one in found.items()} == {
        "all-gatherpred": 3 * 64,
        "all-gatherbf16": 3 * 256,
        "collective-permutebf16": 6 * 64,
        "reduce-scatterbf16": 3 * 256,
        "all-reducef32": 16 + 24,
    }
    assert totals(list(found.values()))["all-gather"] == (6, 3 * (64 + 256))


def test_groups_are_told_apart_by_the_axes_of_the_mesh(found):
    assert {name: one.axes for name, one in found.items()} == {
        "all-gatherpred": ("fsdp",),
        "all-gatherbf16": ("fsdp",),
        "collective-permutebf16": ("fsdp",),
        "reduce-scatterbf16": ("tensor",),
        "all-reducef32": ("fsdp",),
    }


def test_weights_are_gathered_at_once_and_part_by_part(found):
    weights = {8 * 16: "bf16"}
    assert gathered_weights(list(found.values()), weights, 4) == 3 * 256 + 6 * 64
    assert gathered_weights(list(found.values()), {8 * 16: "f32"}, 4) == 0
