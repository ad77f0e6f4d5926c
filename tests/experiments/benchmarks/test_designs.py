"""The designs of DoRA's scale differ in what they cost only."""

from __future__ import annotations

import pytest

from experiments.benchmarks.designs import DESIGNS, measure


@pytest.mark.full
def test_every_design_has_the_same_gradient():
    found = measure(width=64, rank=3, depth=2, tokens=8, rounds=1)
    errors = {design: m.error for design, m in found.items() if design != "lora"}
    assert errors.keys() == DESIGNS.keys() - {"lora"}
    assert all(error <= 1e-5 for error in errors.values()), errors
    assert found["materialized"].gigaflops > found["in layer"].gigaflops > found["lora"].gigaflops
