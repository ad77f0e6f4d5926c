"""A run folder says how its results were made, and is of one run."""

from __future__ import annotations

import json

import jax
import pytest

from experiments.trainer.run_folder import finish_run, finished_run, start_run


def test_a_folder_holds_settings_starts_and_summary(tmp_path):
    settings = {"rank": 2, "rates": (1e-3, 1e-4)}
    for _ in range(2):
        start_run(tmp_path, settings)
        assert finished_run(tmp_path, settings) is None
    starts = json.loads((tmp_path / "run.json").read_text())
    assert len(starts) == 2
    assert starts[0]["versions"]["jax"] == jax.__version__ and "python" in starts[0]["command"]
    assert starts[0]["devices"].endswith(jax.devices()[0].device_kind)
    assert starts[0]["git"] is None or len(starts[0]["git"].partition("+")[0]) == 40
    finish_run(tmp_path, {"accuracy": 0.5})
    assert finished_run(tmp_path, settings) == {"accuracy": 0.5}


def test_a_run_of_other_settings_is_neither_continued_nor_read(tmp_path):
    start_run(tmp_path, {"rank": 2})
    with pytest.raises(SystemExit, match="other settings"):
        start_run(tmp_path, {"rank": 4})
    finish_run(tmp_path, {})
    with pytest.raises(SystemExit, match="other settings"):
        finished_run(tmp_path, {"rank": 4})
