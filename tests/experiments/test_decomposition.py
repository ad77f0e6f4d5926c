"""The decomposition experiment on a tiny task: what it records, what it keeps, what it reports."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import decomposition
from experiments.reporting.decomposition import read_points, verdict
from experiments.reporting.folders import ReportError
from experiments.reporting.recorder import Recorder
from experiments.reporting.statistics import Interval
from tests.experiments.tiny_task import tiny_task


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decomposition, "load_task", lambda **_: tiny_task(train=33))
        yield decomposition.Config(
            methods=("full", "dora"),
            seeds=1,
            checkpoints=2,
            rank=2,
            train_examples=33,
            batch_size=8,
            max_length=6,
            run_folder=tmp_path_factory.mktemp("decomposition"),
        )


@pytest.fixture(scope="module")
def printed(config):
    return decomposition.run(config)


def test_changes_are_recorded_at_every_checkpoint_and_ranks_at_the_last(config, printed):
    for run in config.runs():
        lines = (run.folder / "changes.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [(row["step"], row["layer"]) for row in rows] == [(2, "hidden"), (4, "hidden")]
        assert "effective_rank" in rows[1] and "effective_rank" not in rows[0]
        assert all(row["direction"] > 0 for row in rows)
        summary = json.loads((run.folder / "summary.json").read_text())
        assert summary["trainable_parameters"] > 0 and summary["forgetting"] is None
        assert f"{rows[1]['effective_rank']:.1f}" in printed


def test_the_recorder_measures_what_was_changed():
    """One of eight columns is doubled: a change of rank 1 that turns nothing."""
    base = tiny_task().model(seed=0)
    model = tiny_task().model(seed=0)
    kernel = np.asarray(model.hidden.kernel[...])
    model.hidden.kernel[...] = jnp.asarray(kernel * np.where(np.arange(8) == 3, 2, 1))
    recorder = Recorder(base, every=2, steps=3)
    figures = [recorder(model), recorder(model)]
    rows = [json.loads(line) for line in recorder.lines().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    expected = np.linalg.norm(kernel[:, 3].astype(np.float64)) / 8
    assert figures[0]["magnitude"] == pytest.approx(expected, rel=1e-5)
    assert rows[1]["relative_magnitude"] == pytest.approx(1 / 8, rel=1e-5)
    assert rows[1]["direction"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["effective_rank"] == pytest.approx(1, rel=1e-3)


def test_a_finished_run_is_not_trained_again_and_an_unfinished_one_is_named(config, printed):
    assert decomposition.run(config) == printed
    kept, gone = (run.folder for run in config.runs())
    points = read_points([kept, gone, gone.with_name("never")])
    assert len(points.rows) == 4 and len(points.problems) == 1
    assert "never has no config.json and no summary.json and no changes.jsonl" in points.problems[0]
    with pytest.raises(ReportError, match="no run has changes"):
        read_points([gone.with_name("never")])


def test_a_dry_run_says_what_is_left_and_trains_nothing(config, printed):
    other = decomposition.dataclasses.replace(config, dry_run=True, seeds=2)
    before = sorted(config.run_folder.rglob("*"))
    text = decomposition.run(other)
    assert sorted(config.run_folder.rglob("*")) == before
    assert "4 runs" in text and "4 steps of 48 tokens" in text and "1 of 2 seeds are left" in text
    trained = 30 * 8 + 8 * 8 + 8 + 8 * 2 + 2
    assert f"{trained:,} trainable parameters" in text


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (Interval(-0.5, -0.8, -0.1), -0.62, "reproduced"),
        (Interval(0.5, 0.1, 0.8), -0.62, "refuted here"),
        (Interval(0.5, -0.1, 0.8), 0.83, "undecided: the interval holds 0"),
        (Interval(0.5, float("nan"), float("nan")), 0.83, "undecided: the interval holds 0"),
        (Interval(0.5, 0.1, 0.8), None, None),
    ],
)
def test_a_sign_is_reproduced_only_if_the_interval_excludes_zero(found, expected, said):
    assert verdict(found, expected) == said
