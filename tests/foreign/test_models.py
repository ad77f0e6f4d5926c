"""Laws that hold for any model, on models that this project did not write."""

from __future__ import annotations

import functools

import pytest

from tests.foreign.harness import Report, run
from tests.foreign.table import CASES

pytestmark = pytest.mark.foreign

# Outputs are of size 1 to 10, in float32.
TOLERANCE = 1e-5

# The tests of one model run in one process, which adapts and trains it once.
each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]
)


@functools.cache
def report_of(name: str) -> Report:
    return run(CASES[name]())


@each_model
def test_identity_at_the_start(name):
    report = report_of(name)
    assert report.start == 0
    assert report.start_optimized <= TOLERANCE  # the last bits, see `harness.AS_WRITTEN`


@each_model
def test_training_learns(name):
    before, after = report_of(name).losses
    assert after < before


@each_model
def test_training_moves_every_adapter_array(name):
    assert report_of(name).idle == []


@each_model
def test_training_leaves_every_bit_of_the_base(name):
    assert report_of(name).base_unchanged


@each_model
def test_merged_model_computes_what_the_adapted_one_does(name):
    assert report_of(name).merged <= TOLERANCE


@each_model
def test_merged_kernels_are_those_of_the_formula(name):
    assert report_of(name).kernels <= 1e-6
