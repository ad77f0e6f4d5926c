"""A quantised decoder holds fewer bytes; its steps are timed beside others."""

from __future__ import annotations

import dataclasses

import pytest

from experiments.benchmarks.cases import SMOLLM2_135M
from experiments.benchmarks.quantized_smollm2 import Config, measure, table


@pytest.mark.full
def test_each_base_has_its_bytes_and_times():
    small = dataclasses.replace(SMOLLM2_135M, vocab_size=64, num_hidden_layers=2)
    rows = measure(Config(bases=("bf16", "int8"), tokens=8, rank=2, rounds=2), small)
    assert 0.5 < rows["int8"]["held_bytes"] / rows["bf16"]["held_bytes"] < 0.6
    assert rows["bf16"]["ratio"] == 1 < 2 * rows["int8"]["ratio"]
    lines = list(table(rows))
    assert lines[2].startswith("| bf16 |") and lines[3].startswith("| int8 |")
