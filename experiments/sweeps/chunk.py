"""Trains members of one family at once, to the end, and writes their run folders."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.sweeps.members import Member
from experiments.sweeps.program import Outcomes, Programs, Schedule, State
from experiments.sweeps.saved import Checkpoint, save_arrays
from experiments.sweeps.task import Batch
from experiments.tasks.metrics import MetricsWriter, read_metrics
from experiments.trainer.progress import Progress, Speed, tokens_in
from experiments.trainer.run_folder import finish_run, start_run
from experiments.trainer.signals import InterruptedStepError, deferred


@dataclasses.dataclass(frozen=True)
class Runs:
    """The run folders of a sweep's members, and what is written into all of them.

    Attributes:
        folder: With a folder for each member, and `.checkpoints`.
        names: The folders of the members.
        configs: For `config.json`.
        evaluations: Number of evaluations of a run; the last is after the last step.
        checkpoint_seconds: Time between two checkpoints.
    """

    folder: Path
    names: Mapping[Member, str]
    configs: Mapping[Member, dict[str, Any]]
    evaluations: int = 1
    checkpoint_seconds: float = 120.0


class Chunk:
    """The training of members that are trained at once.

    A member whose loss is not finite is no error. The others do not see it, and its summary has
    `diverged_at_step`, and null in place of each metric. When all have diverged, training ends.

    Args:
        programs: Of their family.
        members: At least one. A repeated one only fills the place.
        schedule: Of the learning rate.
        runs: Where they are written.
    """

    def __init__(
        self, programs: Programs, members: Sequence[Member], schedule: Schedule, runs: Runs
    ) -> None:
        self.programs, self.members, self.runs = programs, list(members), runs
        self.own = list(dict.fromkeys(members))
        self.task, self.steps = programs.stack.task, schedule.steps
        configs = [runs.configs[member] for member in members]
        self.checkpoint = Checkpoint(runs.folder / ".checkpoints", configs)
        self.every = max(1, -(-self.steps // runs.evaluations))
        self.diverged: dict[Member, int] = {}
        self.seconds: list[float] = []
        self.speed = Speed(0)
        self.saved_at = time.monotonic()

    def folder_of(self, member: Member) -> Path:
        """Returns the run folder of a member."""
        return self.runs.folder / self.runs.names[member]

    def train(self) -> None:
        """Trains to the end; an interrupted training goes on where it was.

        Raises:
            InterruptedStepError: A signal came, and the step that was running is saved.
        """
        start = self.programs.start(self.members)
        first, state = self.checkpoint.restore(start)
        with contextlib.ExitStack() as stack:
            self.writers = {m: stack.enter_context(self._writer(m, first)) for m in self.own}
            title = f"{self.task.name}, {self.members[0].method} x {len(self.own)}"
            self.progress = stack.enter_context(Progress(title, self.steps, first))
            asked = stack.enter_context(deferred())
            data = [self.task.batches(m.seed, m.batch_size) for m in self.members]
            for own in data:  # those of the steps before
                for _ in range(first):
                    next(own)
            self.clock, running = time.perf_counter(), None
            metrics = self._evaluated(state) if first == self.steps else {}
            for number in range(first + 1, self.steps + 1):
                batches = [next(own) for own in data]
                state, outcomes = self._step(state, batches, compiles=number == first + 1)
                self._report(running)
                running = number, outcomes
                asked.at(number)
                if self._stops(number, asked.number):
                    self._report(running)
                    running = None
                    if number == self.steps or number % self.every == 0:
                        metrics = self._evaluate(number, state)
                    self._save(number, state, asked.number)
                if len(self.diverged) == len(self.own):
                    break
            self._finish(state, metrics)

    def _writer(self, member: Member, first: int) -> MetricsWriter:
        folder = self.folder_of(member)
        folder.mkdir(parents=True, exist_ok=True)
        start_run(folder, self.runs.configs[member])
        writer = MetricsWriter(folder, resume_step=first + 1)
        # A member that diverges has no losses from there on.
        taken = sum(line["split"] == "train" for line in read_metrics(folder))
        if taken < first:
            self.diverged[member] = taken + 1
        return writer

    def _step(
        self, state: State, batches: list[Batch], *, compiles: bool
    ) -> tuple[State, Outcomes]:
        self.speed.tokens = sum(map(tokens_in, batches))
        with self.progress.compiling() if compiles else contextlib.nullcontext():
            return self.programs.step(state, self.members, batches)

    def _report(self, running: tuple[int, Outcomes] | None) -> None:
        """Waits for a step, and writes its losses."""
        if running is None:
            return
        number, (loss, square) = running[0], map(np.asarray, running[1])
        now = time.perf_counter()
        self.seconds.append(now - self.clock)
        self.clock = now
        self.speed.add(self.seconds[-1])
        for i, member in enumerate(self.own):
            if not (np.isfinite(loss[i]) and np.isfinite(square[i])):
                self.diverged.setdefault(member, number)
            if member not in self.diverged:
                self.writers[member].write(number, "train", {"loss": loss[i]})
        finite = loss[np.isfinite(loss)]
        shown = {"loss": float(np.median(finite))} if len(finite) else {}
        self.progress.step(shown, self.speed)

    def _stops(self, number: int, signal: int | None) -> bool:
        """Whether the state after a step is needed: to evaluate, or to save it."""
        due = time.monotonic() - self.saved_at > self.runs.checkpoint_seconds
        return number == self.steps or number % self.every == 0 or due or signal is not None

    def _save(self, number: int, state: State, signal: int | None) -> None:
        """Saves the state, if it is time to or a signal came; ends the run after a signal."""
        due = time.monotonic() - self.saved_at > self.runs.checkpoint_seconds
        if signal is not None or due:
            self.checkpoint.save(number, state)
            self.saved_at = time.monotonic()
        if signal is not None:
            raise InterruptedStepError(signal, number)
        self.clock = time.perf_counter()

    def _evaluated(self, state: State) -> dict[Member, dict[str, float]]:
        """Returns the metrics of each member on the validation examples."""
        batches = self.task.eval_batches("validation")
        outputs = self.programs.predict(state, self.members, batches)
        return {
            member: dict(self.task.score("validation", outputs[i]).metrics)
            for i, member in enumerate(self.own)
            if np.isfinite(outputs[i]).all() and member not in self.diverged
        }

    def _evaluate(self, number: int, state: State) -> dict[Member, dict[str, float]]:
        found = self._evaluated(state)
        for member in self.own:
            if member in found:
                self.writers[member].write(number, "validation", found[member])
            else:
                self.diverged.setdefault(member, number)
        return found

    def _finish(self, state: State, metrics: dict[Member, dict[str, float]]) -> None:
        """Writes the trained arrays and the summaries."""
        stack, count = self.programs.stack, len(self.members)
        step = float(np.median(self.seconds[1:])) / count if len(self.seconds) > 1 else None
        nothing = dict.fromkeys((self.task.metric, "loss"))
        for i, member in enumerate(self.own):
            arrays = stack.arrays_of(member, state.trained, i)
            folder = self.folder_of(member)
            save_arrays(folder / "trained.npz", zip(stack.names(), arrays, strict=True))
            summary = {
                "validation": nothing if member in self.diverged else metrics[member],
                "metric": self.task.metric,
                "trainable_parameters": sum(x.size for x in arrays),
                "seconds_per_step": step,
                "members": count,
                "temporary_bytes": self.programs.temporary_bytes.get(count),
                "forgetting": None,
            }
            if member in self.diverged:
                summary["diverged_at_step"] = self.diverged[member]
            finish_run(folder, summary)
        self.checkpoint.remove()
