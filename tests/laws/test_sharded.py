"""On several devices everything is as on one. How many there are is settled when JAX starts."""

from __future__ import annotations

import json

import pytest

from tests.checkpoint.runs import run_module

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "fsdp=4,tensor=2",
    "data=2,fsdp=2,tensor=2",
)
CASES = (
    ("llama", "auto"),
    ("llama scanned", "auto"),
    ("nnx", "explicit"),
    ("nnx scanned", "explicit"),
    ("llama scanned", "explicit"),
    ("llama", "explicit"),
    ("linen scanned", "auto"),
    ("linen scanned", "explicit"),
)
# Each mesh with two models; `python -m tests.laws.sharded` runs any pair.
ROWS = [
    (*CASES[i % len(CASES)], mesh)
    for n, mesh in enumerate(MESHES)
    for i in (n, n + len(CASES) // 2)
]


def test_a_layer_cut_on_in_and_out_axes_is_that_of_numpy():
    found = json.loads(run_module("tests.laws.sharded_layer", devices=4))
    assert "check_vma" in found.pop("refusal")
    for way, errors in found.items():
        assert max(errors.values()) <= 2e-6, (way, errors)


@pytest.mark.full
@pytest.mark.parametrize(("model", "axes", "mesh"), ROWS)
def test_training_on_a_mesh_is_training_on_one_device(model, axes, mesh):
    found = json.loads(run_module("tests.laws.sharded", model, mesh, axes, devices=8))
    assert found["whole"] == []
    assert found["gradients"] <= 5e-6
    assert found["losses"] <= 1e-6
