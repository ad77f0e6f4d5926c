"""The GLUE experiment on a tiny encoder: fair, resumable, and honest about its choice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import glue
from experiments.tasks.glue.presets import PRESETS, RATES
from experiments.trainer.settings import SettingsError, TrainerSettings
from tests.experiments.tasks.glue_files import rows_of_words, write_encoder


def write_rte(folder: Path) -> Path:
    (folder / "RTE").mkdir(parents=True)
    for name, rows in (("train", rows_of_words(32, words=2)), ("dev", rows_of_words(25, words=2))):
        assert rows.second is not None
        lines = [
            f"{i}\t{first}\t{second}\t{'not_' * int(label)}entailment"
            for i, (first, second, label) in enumerate(
                zip(rows.first, rows.second, rows.labels, strict=True)
            )
        ]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n"
        (folder / "RTE" / f"{name}.tsv").write_text(text)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        ("dora:2",),
        pytest.param(("dora:2", "full"), marks=pytest.mark.full),
    ],
    ids=["one run", "two rates of two methods"],
)
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    several = len(request.param) > 1
    return glue.Config(
        data=write_rte(folder / "data"),
        preset="paper" if several else "small",  # RoBERTa, with dropout
        checkpoint=write_encoder(folder / "tiny", "roberta" if several else "bert"),
        tasks=("rte",),
        methods=request.param,
        rates=(1e-3, 1e-2) if several else (1e-2,),
        choosing_seeds=1,
        seeds=2 if several else 1,
        epochs=1,
        batch_size=8,
        max_length=12,
        run_folder=folder / "runs",
    )


@pytest.fixture(scope="module")
def printed(config):
    return glue.run(config)


def read(file: Path):
    return json.loads(file.read_text())


def test_each_rate_is_tried_and_only_the_best_sees_the_test(config, printed):
    runs = config.run_folder / "glue" / "rte"
    for method in config.methods:
        name, _, rank = method.partition(":")
        folders = {f.name: f for f in runs.glob(f"{name}_*")}
        start = f"{name}_r{rank or 0}_lr-"
        validation = {
            rate: read(folders[f"{start}{rate:g}_seed-0"] / "summary.json")["validation"]
            for rate in config.rates
        }
        best = max(validation, key=lambda r: (validation[r]["accuracy"], -validation[r]["loss"]))
        chosen = {f"{start}{best:g}_seed-{seed}" for seed in range(config.seeds)}
        assert set(folders) == chosen | {f"{start}{rate:g}_seed-0" for rate in config.rates}
        assert {name for name, f in folders.items() if (f / "test.json").exists()} == chosen
        scores = []
        for one in chosen:
            stored = np.load(folders[one] / "test_predictions.npz")
            test = read(folders[one] / "test.json")
            assert test["examples"] == len(stored["labels"]) == 12
            assert test["accuracy"] == np.mean(stored["predictions"] == stored["labels"])
            scores.append(test["accuracy"])
        assert f"accuracy {100 * np.mean(scores):.2f}" in printed
        assert f"{best:g} (edge of those tried)" in printed  # all of so few are
        assert {name for name, f in folders.items() if (f / "trained.npz").exists()} == chosen
        settings = read(folders[one] / "config.json")
        expected = {"experiment": "glue", "task": "rte", "model": "tiny", "method": name}
        expected |= {"epochs": 1.0, "steps": 4, "train_examples": 32, "split_seed": 0}
        assert expected.items() <= settings.items()


def test_finished_runs_are_not_trained_again(config, printed):
    def times():
        files = config.run_folder.rglob("*.json")
        return {file: file.stat().st_mtime_ns for file in files}

    before = times()
    assert glue.run(config) == printed
    assert times() == before


@pytest.mark.full
@pytest.mark.parametrize("config", [("dora:2",)], indirect=True)
def test_a_chosen_run_whose_arrays_are_gone_is_trained_again_for_the_test(config, printed):
    (file,) = config.run_folder.rglob("test.json")
    before = read(file)
    file.unlink()
    (file.parent / "trained.npz").unlink()
    glue.run(config)
    assert read(file) == pytest.approx(before)


def test_runs_of_other_settings_are_not_taken_for_these(config, printed):
    other = dataclasses.replace(config, split_seed=1)
    with pytest.raises(SystemExit, match="other settings"):
        glue.run(other)


@pytest.mark.full
@pytest.mark.parametrize("config", [("dora:2",)], indirect=True)
def test_a_dry_run_trains_nothing(config, tmp_path, capsys):
    text = glue.dry_run(dataclasses.replace(config, run_folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| rte")]
    # Of one layer: six kernels and their magnitudes; and the head.
    shapes = [(32, 32)] * 4 + [(32, 64), (64, 32)]
    trained = sum(2 * (i + o) + o for i, o in shapes) + 32 * 2 + 2
    assert row[1:5] == ["dora:2", "1", "4", f"{trained:,}"]


# Settings.


def test_options_replace_those_of_the_preset(tmp_path):
    own = {"data": tmp_path, "tasks": ("sst2", "rte"), "epochs": 4, "seeds": 7}
    preset = glue.Config(**own, train_examples=9).resolved()
    assert preset.epochs == {"sst2": 4, "rte": 4}
    assert preset.train_examples == {"sst2": 9, "rte": 9}
    assert (preset.seeds, preset.rates, preset.model) == (7, RATES, "MiniLM")
    paper = glue.Config(data=tmp_path, preset="paper", checkpoint=tmp_path / "roberta").resolved()
    assert (paper.model, paper.tasks) == ("roberta", PRESETS["paper"].tasks)
    assert (paper.dropout, paper.pooling, paper.decay) == (None, "cls", "linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("sst",)}, "unknown tasks .'sst'.: choose from cola"),
        ({"methods": ("adalora:8",)}, "unknown method 'adalora:8': give one of full"),
        ({"methods": ("dora:r8",)}, "unknown method 'dora:r8'"),
        ({"methods": ("dora:0",)}, "unknown method 'dora:0'"),
        ({"seeds": 0}, "at least one task, one seed"),
        ({"preset": "paper"}, "needs --checkpoint"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        glue.Config(data=tmp_path, **options)


@pytest.mark.parametrize("function", [glue.run, glue.dry_run])
def test_options_that_a_sweep_does_not_have_are_refused(tmp_path, function):
    config = glue.Config(data=tmp_path, trainer=TrainerSettings(mesh="data=2"))
    with pytest.raises(SettingsError, match="--mesh: runs are spread over all devices"):
        function(config)


def test_help_has_examples_and_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        glue.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "python -m experiments.glue --data glue --dry-run" in text
    assert all(f"--{name}" in text for name in ("choosing-seeds", "full-members", "mesh"))


def test_missing_files_are_one_line(tmp_path, capsys):
    folder = write_encoder(tmp_path / "tiny", "bert")
    options = ["--data", str(tmp_path), "--checkpoint", str(folder), "--tasks", "wnli"]
    with pytest.raises(SystemExit, match=r"neither .*WNLI.dev\.tsv nor"):
        glue.main([*options, "--run-folder", str(tmp_path / "runs")])
