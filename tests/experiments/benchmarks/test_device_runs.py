"""Inference on this machine."""

from experiments.benchmarks import device_runs
from tests.experiments.tiny_models import tiny_mlp


def test_frozen_scale_and_merged_inference_repeat_bit_for_bit_at_the_bases_cost():
    rows = device_runs.measure_inference(tiny_mlp(), rounds=2)
    assert all(row["repeats_bit_for_bit"] for row in rows.values())
    assert rows["merged"]["flops_over_base"] == 1.0
    assert rows["dora"]["flops"] > rows["dora-frozen-scale"]["flops"] > rows["base"]["flops"]
