"""Steps on quantised kernels are compiled and counted, on a TPU that is not there as well."""

from __future__ import annotations

import importlib.util

import pytest

from experiments.benchmarks import quantized_step
from experiments.benchmarks.quantized_step import Config, measure

TINY = ["--width", "64", "--depth", "1", "--tokens", "4", "--rank", "2"]


@pytest.mark.full
def test_the_table_has_a_row_for_each_base(capsys):
    quantized_step.main([*TINY, "--target", "cpu", "--bases", "bf16", "int8"])
    *_, bf16, int8 = capsys.readouterr().out.splitlines()
    assert bf16.startswith("| bf16 |") and "| 1.000 |" in bf16
    assert int8.startswith("| int8 |")


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_tpu_reads_codes_and_keeps_no_dequantised_kernel():
    config = Config(width=2048, depth=2, tokens=256)
    found = measure(config)
    kernel = 2 * config.width**2
    for base, most in (("nf4", 0.7), ("int8", 0.7)):
        row, plain = found[base], found["bf16"]
        assert row["bytes_accessed"] <= most * plain["bytes_accessed"], base
        assert row["temporary_bytes"] <= plain["temporary_bytes"] + kernel, base
        assert row["flops"] <= 1.06 * plain["flops"], base
