"""The experiment on word problems, on small files with a tiny decoder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import math
from tests.support.tiny_llama import write_tiny_llama


def problems(count: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"{i} + 1?",
            "output": f"\nA: The answer is {i + 1}.",
            "answer": f"{i + 1}.0",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for name in ("math_data", "MultiArith/test", "SVAMP/test", "gsm8k/test"):
        file = data / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(problems(7)))
    wrong = {"instruction": "1?", "output": "The answer is 2.", "answer": "1.0"}
    (data / "math_data.json").write_text(json.dumps([*problems(9), wrong]))
    checkpoint = write_tiny_llama(tmp_path_factory.mktemp("checkpoint"))
    given = {
        "data": data,
        "checkpoint": checkpoint,
        "methods": "dora",
        "rank": 2,
        "steps": 2,
        "batch-size": 2,
        "validation-examples": 2,
        "test-examples": 3,
        "new-tokens": 4,
        "run-folder": tmp_path_factory.mktemp("runs"),
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.full
def test_runs_leave_what_the_report_is_made_from(arguments, capsys):
    math.main(arguments)
    printed = capsys.readouterr().out
    assert "7 training rows of 10" in printed  # one is not solved, two are for validation
    config = math.settings(math.Config, None, arguments)
    folder = config.run_folder / "math" / "math_data"
    assert (folder / "math.md").read_text() in printed
    for name in ("base_r0_lr-0_seed-0", "dora_r2_lr-0.001_seed-0"):
        figures = json.loads((folder / name / "test.json").read_text())
        kept = np.load(folder / name / "test_predictions.npz")
        assert figures["examples"] == len(kept["labels"]) == 9
        assert figures["accuracy"] == pytest.approx(np.mean(kept["predictions"] == kept["labels"]))
    math.main([*arguments, "--dry-run"])
    assert "1 runs of 2 steps of 2 rows" in capsys.readouterr().out


def test_what_cannot_be_run_is_refused(arguments):
    config = math.settings(math.Config, None, arguments)
    with pytest.raises(SystemExit, match="needs --checkpoint"):
        math.Config(data=config.data, preset="peft")
    with pytest.raises(SystemExit, match="unknown methods"):
        math.Config(data=config.data, methods=("full",))
