"""LLaMA-7B is adapted without its arrays."""

import json
import os
import subprocess
import sys

import pytest

from experiments.benchmarks.abstract_model import adapt_7b

SIZES = 4 * (4096 + 4096) + 3 * (4096 + 11008)
PARAMETERS = 32 * (32 * SIZES + 5 * 4096 + 2 * 11008)


def test_abstract_llama_7b_has_the_adapters_of_all_its_layers():
    row = adapt_7b(scan_layers=True)
    assert row["kernels"] == 7 and row["trainable_parameters"] == PARAMETERS


@pytest.mark.full
def test_abstract_llama_7b_is_adapted_without_its_arrays():
    finished = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.abstract_model", "--scan"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    row = json.loads(finished.stdout)
    assert row["trainable_parameters"] == PARAMETERS and row["peak_gb"] < 2
