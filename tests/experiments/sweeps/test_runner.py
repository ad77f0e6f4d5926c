"""A sweep leaves a folder for each member, continues where it stopped, tests what it is told to."""

import contextlib
import copy
import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from experiments.sweeps.members import Member
from experiments.sweeps.runner import Sweep, SweepSettings
from experiments.tasks.metrics import read_metrics
from experiments.trainer.signals import InterruptedStepError
from tests.checkpoint.runs import run_module
from tests.experiments.sweeps.tiny_sweep import tiny_sweep_task

TASK = tiny_sweep_task()
MEMBERS = [
    Member(rank=2, alpha=4.0, batch_size=4, learning_rate=rate, seed=seed)
    for rate, seed in ((1e-2, 0), (3e-2, 1), (1e30, 0))
]
STEPS = 16


@dataclasses.dataclass(frozen=True)
class Signalled:
    """The task, with a signal while a batch of one member is made; it records the batches."""

    of: object
    number: int = 0
    drawn: list = dataclasses.field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.of, name)

    def batches(self, seed, batch_size):
        for number, batch in enumerate(self.of.batches(seed, batch_size), 1):
            self.drawn.append(number)
            if number == self.number and seed == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@contextlib.contextmanager
def of_task(sweep, task):
    """The sweep and its programs have another task within the block."""
    stack = sweep._programs[1].stack
    before, stack.task, sweep.task = stack.task, task, task
    yield
    stack.task = sweep.task = before


def in_folder(sweep, folder):
    """A sweep in another folder, with the programs that are compiled already."""
    other = copy.copy(sweep)
    other.folder = folder
    return other


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    sweep = Sweep(TASK, SweepSettings(experiment="try", folder=folder, epochs=2, members=3))
    sweep.run(MEMBERS)
    return sweep


def arrays(sweep, member):
    with np.load(sweep.folder_of(member) / "trained.npz") as saved:
        return dict(saved)


def test_each_member_has_a_folder_of_its_own(sweep):
    member = MEMBERS[0]
    folder = sweep.settings.folder / "try" / "tiny" / "dora_r2_lr-0.01_seed-0_batch-size-4"
    config = json.loads((folder / "config.json").read_text())
    expected = {"experiment": "try", "task": "tiny", "method": "dora", "rank": 2, "alpha": 4.0}
    expected |= {"learning_rate": 1e-2, "seed": 0, "steps": STEPS, "train_examples": 32}
    assert expected.items() <= config.items() and not (folder / "test.json").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "accuracy" and 0 <= summary["validation"]["accuracy"] <= 1
    assert summary["trainable_parameters"] == sum(x.size for x in arrays(sweep, member).values())
    lines = read_metrics(folder)
    assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] == summary["validation"]["loss"]
    assert not list(sweep.folder.glob(".checkpoints/*"))


def test_a_member_that_diverges_disturbs_no_other(sweep):
    broken, other = sweep.summary(MEMBERS[2]), sweep.summary(MEMBERS[0])
    assert broken["validation"] == {"accuracy": None, "loss": None}
    assert broken["diverged_at_step"] <= STEPS and "diverged_at_step" not in other
    assert all(np.isfinite(x).all() for x in arrays(sweep, MEMBERS[0]).values())


def test_members_that_all_diverge_are_not_trained_to_the_end(sweep, tmp_path):
    own = [dataclasses.replace(MEMBERS[2], seed=seed) for seed in range(3)]
    other, drawn = in_folder(sweep, tmp_path), []
    with of_task(other, Signalled(TASK, drawn=drawn)):
        summaries = other.run(own).values()
    assert 0 < len(drawn) < len(own) * STEPS
    assert all(summary["validation"]["loss"] is None for summary in summaries)


def test_an_interrupted_sweep_ends_with_the_bits_of_an_uninterrupted_one(sweep, tmp_path):
    again = in_folder(sweep, tmp_path)
    with of_task(again, Signalled(TASK, 7)), pytest.raises(InterruptedStepError, match="step 7"):
        again.run(MEMBERS)
    assert not list(tmp_path.glob("*/summary.json"))
    (saved,) = tmp_path.glob(".checkpoints/*.npz")
    with np.load(saved) as state:
        assert state["step"] == 7
    again.run(MEMBERS)
    for member in MEMBERS:
        for name, x in arrays(again, member).items():
            np.testing.assert_array_equal(x, arrays(sweep, member)[name])
        metrics = [read_metrics(own.folder_of(member)) for own in (sweep, again)]
        assert metrics[0] == metrics[1]
        at = [own.summary(member).get("diverged_at_step") for own in (sweep, again)]
        assert at[0] == at[1]


def test_finished_members_are_not_trained_again(sweep):
    before = {file: file.stat().st_mtime_ns for file in sweep.folder.glob("*/summary.json")}
    assert sweep.run(MEMBERS).keys() == set(MEMBERS)
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_only_the_members_that_are_named_see_the_test_split(sweep):
    member = MEMBERS[1]
    scores = sweep.test([member])[member]
    assert [file.parent for file in sweep.folder.glob("*/test.json")] == [sweep.folder_of(member)]
    with np.load(sweep.folder_of(member) / "test_predictions.npz") as saved:
        right = saved["predictions"] == saved["labels"]
    assert scores["accuracy"] == right.mean() and scores["examples"] == len(right) == 40


def test_groups_are_of_equal_size_so_that_one_program_serves_all(sweep):
    own = [dataclasses.replace(MEMBERS[0], seed=seed) for seed in range(7)]
    chunks = sweep.chunks(own)
    assert [len(chunk) for chunk in chunks] == [3, 3, 3]
    assert list(dict.fromkeys(m for chunk in chunks for m in chunk)) == own
    full = [dataclasses.replace(member, method="full") for member in own[:2]]
    assert [len(chunk) for chunk in sweep.chunks(full)] == [1, 1]


@pytest.mark.full
def test_members_are_spread_over_devices():
    found = json.loads(run_module("tests.experiments.sweeps.on_devices", devices=2))
    assert found["devices"] == 2 and found["arrays"] == [2]
    assert found["loss"] <= 1e-6 and found["outputs"] <= 1e-5
