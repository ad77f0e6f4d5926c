"""Trains the members of a sweep, many at once, and keeps their results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.sweeps.chunk import Chunk, Runs
from experiments.sweeps.members import Member
from experiments.sweeps.program import Programs, Schedule
from experiments.sweeps.saved import load_arrays
from experiments.sweeps.stack import Stack
from experiments.sweeps.task import SweepTask
from experiments.trainer.run_folder import finished_run, write_whole
from experiments.trainer.settings import SettingsError, TrainerSettings

Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What all members of a sweep have in common.

    Attributes:
        experiment: Its name; a folder in `folder`.
        folder: Of all experiments.
        epochs: Passes over the training examples.
        warmup: As in `program.Schedule`.
        decay: The same.
        members: Most members that are trained at once.
        full_members: The same for full fine-tuning, whose members share no arrays.
        microbatches: Parts of each member's batch that are computed one after the other.
        evaluations: Evaluations on the validation examples, the last after the last step.
        usual: Folders are named by what differs from this member.
        task_settings: Further settings of the task on which the results depend, as JSON.
    """

    experiment: str
    folder: Path
    epochs: float = 1.0
    warmup: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"
    members: int = 8
    full_members: int = 1
    microbatches: int = 1
    evaluations: int = 1
    usual: Member = dataclasses.field(default_factory=Member)
    task_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def schedule(self, task: SweepTask, batch_size: int) -> Schedule:
        """Returns the schedule of members with this batch size."""
        steps = max(1, round(self.epochs * (task.train_examples // batch_size)))
        return Schedule(steps=steps, warmup=self.warmup, decay=self.decay)


def check_trainer(trainer: TrainerSettings) -> None:
    """Checks that a sweep does what the options of the trainer say.

    Raises:
        SettingsError: A mesh or a trace is asked for.
    """
    if trainer.mesh:
        raise SettingsError(
            "--mesh: runs are spread over all devices by themselves, if --members is a multiple of "
            "their number. Leave it out"
        )
    if trainer.profile is not None:
        raise SettingsError("--profile: several runs at once are not traced. Leave it out")


class Sweep:
    """Trains members and keeps their results, so that none is trained twice.

    Everything lies in `<folder>/<experiment>/<task>`: for each member a folder as `run_folder`
    describes it, with `trained.npz`, its trained arrays. Members that were interrupted go on from
    `.checkpoints/`.

    Args:
        task: The task.
        settings: What the members have in common.
    """

    def __init__(self, task: SweepTask, settings: SweepSettings) -> None:
        self.task, self.settings = task, settings
        self.folder = settings.folder / settings.experiment / task.name
        self._programs: tuple[Member, Programs] | None = None

    def folder_of(self, member: Member) -> Path:
        """Returns the run folder of a member."""
        return self.folder / member.name(self.settings.usual)

    def config_of(self, member: Member) -> dict[str, Any]:
        """Returns everything on which the result of a member depends, for `config.json`."""
        settings, task = self.settings, self.task
        schedule = settings.schedule(task, member.batch_size)
        return {
            "experiment": settings.experiment,
            "task": task.name,
            "model": task.base,
            **member.settings(),
            "epochs": settings.epochs,
            **dataclasses.asdict(schedule),
            "max_length": task.max_length,
            "train_examples": task.train_examples,
            "microbatches": settings.microbatches,
            **settings.task_settings,
        }

    def summary(self, member: Member) -> Summary | None:
        """Returns the summary of a finished member, or None.

        Raises:
            SystemExit: The folder holds a run of other settings.
        """
        return finished_run(self.folder_of(member), self.config_of(member))

    def run(self, members: Sequence[Member]) -> dict[Member, Summary]:
        """Trains the members that are not finished, and returns the summaries of all.

        Raises:
            InterruptedStepError: A signal came. The same call goes on from that step.
        """
        unfinished = [m for m in dict.fromkeys(members) if self.summary(m) is None]
        for family in self.families(unfinished):
            programs = self._programs_of(family)
            schedule = self.settings.schedule(self.task, family[0].batch_size)
            for chunk in self.chunks(family):
                Chunk(programs, chunk, schedule, self._runs(chunk)).train()
        found = {member: self.summary(member) for member in members}
        return {member: summary for member, summary in found.items() if summary is not None}

    def test(self, members: Sequence[Member]) -> dict[Member, dict[str, float]]:
        """Evaluates finished members on the test split, which nothing else reads.

        Writes `test.json` and `test_predictions.npz` of each that has none, and returns the
        metrics. Members whose trained arrays were removed (`forget`) are trained again.
        """
        untested = [m for m in dict.fromkeys(members) if not self._test_file(m).exists()]
        for member in untested:
            if not (self.folder_of(member) / "trained.npz").exists():
                (self.folder_of(member) / "summary.json").unlink(missing_ok=True)
        self.run(untested)
        for family in self.families(untested):
            programs = self._programs_of(family)
            names = programs.stack.names()
            for chunk in self.chunks(family):
                saved = [load_arrays(self.folder_of(m) / "trained.npz", names) for m in chunk]
                state = programs.start(chunk)._replace(trained=programs.stack.stack(saved))
                outputs = programs.predict(state, chunk, self.task.eval_batches("test"))
                for member, own in zip(chunk, outputs, strict=True):
                    self._write_test(member, own)
        return {m: json.loads(self._test_file(m).read_text(encoding="utf-8")) for m in members}

    def forget(self, members: Sequence[Member]) -> None:
        """Removes the trained arrays of members that are not needed; their results stay."""
        for member in members:
            (self.folder_of(member) / "trained.npz").unlink(missing_ok=True)

    def chunks(self, family: Sequence[Member]) -> list[list[Member]]:
        """Returns members of one family in groups of equal size, which are trained at once.

        So one program trains all of them. The last member is repeated to fill its group.
        """
        full = family[0].kind.switches is None
        most = self.settings.full_members if full else self.settings.members
        count = -(-len(family) // most)
        size = -(-len(family) // count)
        chunks = [list(family[i : i + size]) for i in range(0, len(family), size)]
        chunks[-1] += [chunks[-1][-1]] * (size - len(chunks[-1]))
        return chunks

    def families(self, members: Sequence[Member]) -> list[list[Member]]:
        """Returns members in groups, each of which one program can train."""
        families: dict[Member, list[Member]] = {}
        for member in members:
            families.setdefault(member.family(self.task), []).append(member)
        return list(families.values())

    def _programs_of(self, family: Sequence[Member]) -> Programs:
        """Returns the programs of a family, those of the last call if their rank is enough."""
        key, rank = family[0].family(self.task), max(member.rank for member in family)
        known, programs = self._programs or (None, None)
        if programs is not None and known == key and programs.stack.shape.rank >= rank:
            return programs
        schedule = self.settings.schedule(self.task, family[0].batch_size)
        microbatches = self.settings.microbatches
        programs = Programs(Stack(self.task, family), schedule, microbatches=microbatches)
        self._programs = key, programs  # one alone: each holds the base
        return programs

    def _runs(self, members: Sequence[Member]) -> Runs:
        return Runs(
            self.folder,
            {member: self.folder_of(member).name for member in members},
            {member: self.config_of(member) for member in members},
            self.settings.evaluations,
        )

    def _test_file(self, member: Member) -> Path:
        return self.folder_of(member) / "test.json"

    def _write_test(self, member: Member, outputs: np.ndarray) -> None:
        scores, folder = self.task.score("test", outputs), self.folder_of(member)
        arrays = {"predictions": scores.predictions, "labels": scores.labels}
        np.savez(folder / "test_predictions.npz", **arrays)  # type: ignore[arg-type]
        figures = {**scores.metrics, "examples": len(scores.labels)}
        write_whole(self._test_file(member), json.dumps(figures, indent=2) + "\n")
