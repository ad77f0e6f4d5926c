"""The benchmark for a GPU: its table, and what it refuses."""

import json

import pytest

from experiments import gpu
from experiments.benchmarks.gpu_table import write_table

ROW = {
    "title": "DoRA",
    "seconds": 0.0095,
    "seconds_quartiles": (0.0094, 0.0096),
    "over": {"lora": {"median": 1.3, "quartiles": (1.28, 1.32)}},
    "peak_bytes": 1.79e9,
}


def test_the_table_has_a_row_a_method_and_says_what_was_left_out(tmp_path):
    parts = {
        "train": {"title": "Training step", "rows": {"dora": ROW}},
        "later": {"title": "Forward pass", "left_out": "no time left"},
        "broken": {"title": "Members", "error": "ValueError: no"},
    }
    text = write_table(parts, tmp_path)
    assert "| DoRA | 9.50 (9.40 to 9.60) | 1.300 (1.280 to 1.320) |  |  |  | 1.79 |  |" in text
    assert "Not measured: no time left" in text and "Not measured: ValueError: no" in text
    assert (tmp_path / "gpu.md").read_text() == text


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown parts"):
        gpu.main(["--parts", "train-1-1", "--results-folder", str(tmp_path)])


def test_the_rates_of_the_device_are_measured(tmp_path, capsys):
    gpu.main(["--parts", "ceilings", "--results-folder", str(tmp_path)])
    figures = json.loads((tmp_path / "gpu.json").read_text())["ceilings"]["figures"]
    assert all(value > 0 for value in figures.values())
    assert "bfloat16 product" in capsys.readouterr().out
