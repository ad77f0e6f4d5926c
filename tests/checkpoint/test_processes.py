"""Checkpoints across processes: saved on other devices, and killed while they are written."""

from __future__ import annotations

import pytest

from tests.checkpoint import sharded
from tests.checkpoint.runs import run_module


@pytest.mark.full
def test_a_run_saved_on_four_devices_is_restored_on_one(tmp_path):
    saved = run_module("tests.checkpoint.sharded", tmp_path, "save", 4, devices=4)
    assert "magnitude" in saved
    assert f"{sharded.run('restore', tmp_path, 1)}\n" == saved


@pytest.mark.full
def test_a_run_saved_on_four_devices_is_restored_on_two(tmp_path):
    saved = run_module("tests.checkpoint.sharded", tmp_path, "save", 4, devices=4)
    restored = run_module("tests.checkpoint.sharded", tmp_path, "restore", 2, 1, devices=2)
    assert restored == 2 * saved


@pytest.mark.parametrize(
    ("kills", "steps"), [(3, 60), pytest.param(20, 400, marks=pytest.mark.full)]
)
@pytest.mark.full
def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(tmp_path, kills, steps):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    lines = run_module("tests.checkpoint.killed", tmp_path, kills, steps, **cache).splitlines()
    starts = [int(line.split()[1]) for line in lines if line.startswith("start")]
    assert len(starts) == kills + 1 and starts == sorted(starts)
    assert starts[-1] >= kills, "the kills left no progress"
