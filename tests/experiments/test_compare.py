"""The comparison on a tiny budget: fair, resumable, and honest about its choice."""

import json

import numpy as np
import pytest

from experiments import compare
from experiments.tasks.task import load_task
from tests.experiments.tiny_task import tiny_task


@pytest.fixture(
    scope="module",
    params=["tiny task", pytest.param("headlines", marks=pytest.mark.full)],
)
def task(request):
    """A function like `load_task`."""
    if request.param == "headlines":
        yield load_task
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "load_task", lambda **_: tiny_task(train=32))
        yield compare.load_task


@pytest.fixture(scope="module")
def config(request, task, tmp_path_factory):
    checkpoint = request.getfixturevalue("tiny_checkpoint") if task is load_task else None
    return compare.Config(
        methods=("full", "dora"),
        seeds=2,
        learning_rates=(1e-3, 1e-2),
        rank=2,
        checkpoint=checkpoint,
        train_examples=32,
        batch_size=16,
        max_length=12,
        timed_steps=2,
        run_folder=tmp_path_factory.mktemp("compare"),
    )


@pytest.fixture(scope="module")
def printed(config):
    return compare.run(config)


@pytest.mark.full
def test_every_method_has_each_rate_with_the_first_seed_and_all_seeds_at_the_best(config, printed):
    results = json.loads((config.run_folder / "compare.json").read_text())["results"]
    for method in config.methods:
        row = results[method]
        validation = {float(k): v for k, v in row["validation_by_learning_rate"].items()}
        assert set(validation) == set(config.learning_rates)
        assert validation[row["learning_rate"]] == max(validation.values())
        folders = {folder.name for folder in config.run_folder.glob(f"{method}_*")}
        assert folders == {f"{method}_lr-{rate:g}_seed-0" for rate in config.learning_rates} | {
            f"{method}_lr-{row['learning_rate']:g}_seed-{seed}" for seed in range(config.seeds)
        }


@pytest.mark.full
def test_the_table_has_mean_and_deviation_over_the_seeds_of_the_chosen_rate(task, config, printed):
    examples = task(max_length=12, train=32, checkpoint=config.checkpoint).test
    for row in json.loads((config.run_folder / "compare.json").read_text())["results"].values():
        method = "full" if row["title"].startswith("full") else "dora"
        accuracies = []
        for seed in range(config.seeds):
            run = config.run_of(method, row["learning_rate"], seed)
            logits = np.load(run.folder / "test_logits.npy")
            accuracies.append(np.mean(logits.argmax(-1) == examples.labels))
        assert row["test_accuracies"] == pytest.approx(accuracies)
        mean, std = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
        assert f"{row['title']} | {mean:.2f} ± {std:.2f}" in printed
        assert f"{row['trainable_parameters']:,}" in printed
    assert (config.run_folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_trained_again(config, printed):
    before = {file: file.stat().st_mtime_ns for file in config.run_folder.glob("*/summary.json")}
    again = compare.run(config)
    after = {file: file.stat().st_mtime_ns for file in config.run_folder.glob("*/summary.json")}
    assert before == after
    assert [line.split("|")[2] for line in again.splitlines() if line.startswith("| ")] == [
        line.split("|")[2] for line in printed.splitlines() if line.startswith("| ")
    ]


def test_runs_of_other_settings_are_not_taken_for_these(config, printed):
    other = compare.dataclasses.replace(config, rank=1)
    with pytest.raises(SystemExit, match="other settings"):
        compare.run(other)


def test_an_unknown_method_is_named():
    with pytest.raises(SystemExit, match="adalora"):
        compare.Config(methods=("adalora",))
