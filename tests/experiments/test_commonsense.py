"""The commonsense experiment on small files with a tiny decoder: what it trains and tests."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments import commonsense
from experiments.commonsense import Config
from experiments.language.presets import PRESETS
from tests.experiments.commonsense_files import row, write_task
from tests.support.tiny_llama import write_tiny_llama

TASKS = {"boolq": 2, "arc-e": 4, "arc-c": 4, "obqa": 4}
OTHERS = {"piqa": 2, "siqa": 3, "winogrande": 2}


def rows(task: str, options: int, count: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    words = ("true", "false") if task == "boolq" else tuple("abcd"[:options])
    end = " the _ fell" if task == "winogrande" else "?"
    return [
        row(task, f"what {rng.integers(100)}{end}", words, int(rng.integers(options)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of all tasks of the small preset, and a decoder."""
    data = tmp_path_factory.mktemp("data")
    for i, (task, options) in enumerate({**TASKS, **OTHERS}.items()):
        write_task(data, task, "test", rows(task, options, 5, seed=i))
        if task in TASKS:
            write_task(data, task, "train", rows(task, options, 9, seed=10 + i))
    whole = [one for i, (task, n) in enumerate(TASKS.items()) for one in rows(task, n, 4, 20 + i)]
    (data / "commonsense_170k.json").write_text(json.dumps(whole))
    return data, write_tiny_llama(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def config(files, tmp_path_factory):
    data, checkpoint = files
    return Config(
        data=data,
        checkpoint=checkpoint,
        methods=("dora",),
        rank=2,
        learning_rates=(1e-3, 1e-2),
        seeds=2,
        batch_size=4,
        max_length=64,
        train_examples=4,
        validation_examples=2,
        test_examples=3,
        run_folder=tmp_path_factory.mktemp("runs"),
    )


@pytest.fixture(scope="module")
def printed(config):
    commonsense.run(config)
    return (config.design().folder / "commonsense.md").read_text()


@pytest.mark.full
def test_runs_are_chosen_on_validation_rows_and_only_chosen_ones_are_tested(config, printed):
    folders = {
        path.parent.name: path.parent for path in config.design().folder.glob("*/summary.json")
    }
    for method in config.methods:
        of_rate = {}
        for rate in config.rates:
            summary = json.loads(
                (folders[f"{method}_r2_lr-{rate:g}_seed-0"] / "summary.json").read_text()
            )
            of_rate[rate] = summary["validation"]["accuracy"], -summary["validation"]["loss"]
        best = max(config.rates, key=of_rate.get)
        other = min(config.rates, key=of_rate.get)
        for seed in (0, 1):
            assert (folders[f"{method}_r2_lr-{best:g}_seed-{seed}"] / "test.json").exists()
        assert not (folders[f"{method}_r2_lr-{other:g}_seed-0"] / "test.json").exists()
        assert f"{method}_r2_lr-{other:g}_seed-1" not in folders
    assert len(folders) == 4 and "base_r0_lr-0_seed-0" in folders


@pytest.mark.full
def test_the_table_is_the_mean_of_the_predictions_that_were_kept(config, printed):
    names = [*TASKS, *OTHERS]
    for path in config.design().folder.glob("*/test.json"):
        figures = json.loads(path.read_text())
        kept = np.load(path.with_name("test_predictions.npz"))
        right = kept["predictions"] == kept["labels"]
        by_task = {name: right[kept["task"] == name].mean() for name in names}
        assert figures["examples"] == len(right) == 3 * len(names)
        assert figures["accuracy"] == pytest.approx(np.mean(list(by_task.values())))
        for name, accuracy in by_task.items():
            assert figures[f"{name}/accuracy"] == pytest.approx(accuracy)
    lines = [line for line in printed.splitlines() if line.startswith("| DoRA r2")]
    assert len(lines) == 2  # by token, and in the sum


@pytest.mark.full
def test_a_run_says_how_it_was_made_and_what_it_forgot(config, printed):
    for path in config.design().folder.glob("dora_*/summary.json"):
        summary = json.loads(path.read_text())
        stored = json.loads(path.with_name("config.json").read_text())
        assert summary["trainable_parameters"] > 0 and np.isfinite(summary["forgetting"])
        assert stored["train_examples"] == 16 and stored["steps"] == 4
        assert stored["form"] == "text" and stored["target_modules"][0] == "q_proj"
        assert not path.with_name("checkpoints").exists()


@pytest.mark.full
def test_finished_runs_are_kept_and_those_of_other_settings_refused(config, printed):
    before = {file: file.stat().st_mtime_ns for file in config.design().folder.glob("*/*.json")}
    commonsense.run(config)
    assert (config.design().folder / "commonsense.md").read_text() == printed
    assert before == {
        file: file.stat().st_mtime_ns for file in config.design().folder.glob("*/*.json")
    }
    with pytest.raises(SystemExit, match="other settings"):
        commonsense.run(dataclasses.replace(config, test_examples=2))


@pytest.mark.full
@pytest.mark.parametrize("evaluation", [None, "likelihood"])
def test_the_form_of_the_paper_trains_on_instructions_and_finds_the_answers(
    files, tmp_path, monkeypatch, evaluation
):
    data, checkpoint = files
    preset = dataclasses.replace(PRESETS["llama-7b"], test=("boolq", "arc-e"))
    monkeypatch.setitem(PRESETS, "llama-7b", preset)
    config = Config(
        data=data,
        preset="llama-7b",
        methods=("dora",),
        evaluation=evaluation,
        checkpoint=checkpoint,
        batch_size=4,
        max_length=400,
        epochs=1,
        validation_examples=2,
        test_examples=3,
        run_folder=tmp_path,
    )
    commonsense.run(config)
    (path,) = config.design().folder.glob("dora_r16_lr-0.0002_seed-0/test.json")
    figures = json.loads(path.read_text())
    assert {"accuracy", "boolq/accuracy", "arc-e/accuracy"} <= figures.keys()
    assert ("accuracy_sum" in figures) == (evaluation == "likelihood")
    stored = json.loads(path.with_name("config.json").read_text())
    assert stored["form"] == "instruction" and stored["dropout"] == 0.05 and stored["alpha"] == 32
    summary = json.loads(path.with_name("summary.json").read_text())
    assert summary["forgetting"] is None


@pytest.mark.full
def test_a_dry_run_tells_the_steps_and_costs(config, capsys):
    arguments = ["--data", str(config.data), "--checkpoint", str(config.checkpoint), "--dry-run"]
    small = ["--train-examples", "4", "--validation-examples", "2", "--batch-size", "4"]
    commonsense.main([*arguments, *small, "--methods", "dora", "--learning-rates", "1e-3"])
    printed = capsys.readouterr().out
    assert "16 training rows" in printed and "3 runs of 4 steps of 4 rows" in printed
    assert "parameters trained" in printed and "GB in the longest step" in printed


def test_what_cannot_be_run_is_refused(files):
    data, _ = files
    with pytest.raises(SystemExit, match="needs --checkpoint"):
        Config(data=data, preset="llama3-8b")
    with pytest.raises(SystemExit, match="unknown methods"):
        Config(data=data, methods=("full",))
    with pytest.raises(SystemExit, match="--form text compares likelihoods"):
        Config(data=data, evaluation="generation")
    with pytest.raises(SystemExit, match="give --learning-rates"):
        Config(data=data, rank=64)


@pytest.mark.full
def test_a_quantised_base_has_runs_of_its_own(config, tmp_path):
    changes = {"base": "int8", "learning_rates": (1e-2,), "seeds": 1, "run_folder": tmp_path}
    quantized = dataclasses.replace(config, **changes)
    commonsense.run(quantized)
    folder = quantized.design().folder
    assert folder.name.endswith("_int8")
    losses = {}
    for path in folder.glob("*/test.json"):
        losses[path.parent.name] = json.loads(path.read_text())["loss"]
        assert json.loads(path.with_name("config.json").read_text())["base"] == "int8"
    assert losses.keys() == {"base_r0_lr-0_seed-0", "dora_r2_lr-0.01_seed-0"}
    assert len(set(losses.values())) == 2
