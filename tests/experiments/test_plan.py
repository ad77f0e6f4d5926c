"""The command that plans a training step."""

from __future__ import annotations

import importlib.util
import json

import pytest

from experiments import plan
from experiments.planning.models import MODELS
from tests.experiments.tiny_models import LLAMA

TINY = ["--model", "tiny", "--tokens", "8", "--rank", "2", "--no-largest-batch"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", LLAMA)


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_step_is_planned_for_devices_that_are_not_there(capsys, method):
    mesh = ["--mesh", "fsdp=2,tensor=2"]
    plan.main([*TINY, "--target", "cpu", *mesh, "--method", method, "--remat", "none", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "optimising the program" in printed.err
    assert found["totals"]["all-reduce"][0] > 0
    assert {tuple(one["axes"]) for one in found["collectives"]} >= {("fsdp",), ("tensor",)}
    assert found["adapters"] <= 4 * found["trainable"] / 2
    assert found["operations"] > 0
    assert found["moments"] == pytest.approx(2 * found["adapters"], rel=0.1)
    assert found["memory"]["total"] > found["frozen"] + found["adapters"] + found["moments"]
    assert found["fits"] is found["times"] is None  # nothing is published of a CPU


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-8b"], "unknown model 'llama-8b': choose from llama-7b"),
        (["--mesh", "rows=2"], "cannot read 'rows=2'"),
        (["--rows", "0"], "--rows must be at least 1"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        plan.main(arguments)


@pytest.mark.full
def test_a_mesh_of_another_size_than_the_slice_is_refused():
    with pytest.raises(SystemExit, match=r"2 devices, and v99:9x9|cannot compile for 'v99:9x9'"):
        plan.main([*TINY, "--target", "v99:9x9", "--mesh", "fsdp=2"])


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_step_is_planned_for_a_tpu(capsys):
    plan.main([*TINY, "--target", "v5e:2x2", "--mesh", "fsdp=2,tensor=2"])
    found = capsys.readouterr().out
    for words in ("Memory of a device: fits", "all-gather", "Time of a step", "tokens/s"):
        assert words in found
