"""The benchmark of compile time, on one layer."""

from __future__ import annotations

import json

import pytest

from experiments.benchmarks import compile_time

TINY = ["--layers", "1", "--tokens", "8", "--rounds", "1"]


@pytest.mark.full
def test_both_methods_are_measured(tmp_path, capsys):
    compile_time.main([*TINY, "--run-folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| LoRA |" in shown
    assert "| DoRA, exact gradient |" in shown
    found = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert found["dora"]["operations"] > found["lora"]["operations"] > 100
    assert found["lora"]["ratio"] == 1
    assert all(seconds > 0 for row in found.values() for seconds in row["compile_seconds"])


@pytest.mark.parametrize("wrong", [["--case", "gpt"], ["--methods", "lora", "dor"]])
def test_an_unknown_name_is_refused(wrong):
    with pytest.raises(SystemExit, match="choose from"):
        compile_time.main(wrong)
