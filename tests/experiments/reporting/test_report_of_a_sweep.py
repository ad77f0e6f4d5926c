"""What the engine of the sweeps leaves on disk is what a report reads."""

import json

import pytest

from experiments.reporting.folders import read_runs
from experiments.reporting.variants import METRICS, over_examples, over_seeds, variants
from experiments.sweeps.choice import tune
from experiments.sweeps.members import Member
from experiments.sweeps.runner import Sweep, SweepSettings
from tests.experiments.sweeps.tiny_sweep import tiny_sweep_task


@pytest.mark.full
def test_a_report_finds_the_choice_and_the_scores_of_a_sweep(tmp_path):
    """The rate that the sweep chose and tested, and the metric of the predictions that it kept."""
    usual = Member(rank=2, alpha=4.0, batch_size=8)
    sweep = Sweep(
        tiny_sweep_task(),
        SweepSettings(experiment="try", folder=tmp_path, epochs=2, members=4, usual=usual),
    )
    settings = [Member(method=m, rank=2, alpha=4.0, batch_size=8) for m in ("lora", "dora")]
    chosen = tune(sweep, settings, (1e-3, 1e-1), 1, 3)
    read = read_runs([tmp_path])
    found = {variant.method: variant for variant in variants(read.runs)}
    assert read.problems == () and list(found) == ["lora", "dora"]
    for setting, choice in chosen.items():
        variant = found[setting.method]
        assert variant.rate == variant.best_rate == choice.learning_rate
        assert sorted(variant.final) == [0, 1, 2] and variant.at_edge
        for seed, run in variant.final.items():
            test = json.loads((run.folder / "test.json").read_text())
            kept = run.predictions()
            assert variant.scores()[seed] == test["accuracy"]
            score = METRICS["accuracy"](kept["predictions"], kept["labels"])
            assert score == pytest.approx(test["accuracy"])
    seeds, examples = (f(found["dora"], found["lora"]) for f in (over_seeds, over_examples))
    assert seeds.value == pytest.approx(examples.value)
