"""What a run of a sweep costs, measured on two of its steps, for dry runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax

from experiments.sweeps.members import Member
from experiments.sweeps.program import Programs, Schedule
from experiments.sweeps.stack import Stack
from experiments.sweeps.task import Batch, SweepTask
from experiments.trainer.progress import tokens_in


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run costs.

    Attributes:
        parameters: Trained parameters.
        bytes: The arrays that a run has alone, and what a step needs beside them.
        seconds_per_token: Of a training step, padding included.
    """

    parameters: int
    bytes: int
    seconds_per_token: float


@dataclasses.dataclass(frozen=True)
class Planned:
    """Runs of one setting on one task.

    Attributes:
        task: Its name.
        setting: What is trained.
        runs: Number of runs.
        steps: Of each run.
        tokens: Of a step, padding included, on average.
        at_once: Runs that are trained at once.
        cost: Of a run.
    """

    task: str
    setting: str
    runs: int
    steps: int
    tokens: float
    at_once: int
    cost: Cost

    @property
    def seconds(self) -> float:
        """Of a run; runs that are trained at once are taken to need as much one after another."""
        return self.steps * self.tokens * self.cost.seconds_per_token


def table(rows: Sequence[Planned]) -> str:
    """Returns what an experiment would take, as Markdown."""
    total = sum(row.runs * row.seconds for row in rows)
    return "\n".join(
        [
            "| task | setting | runs | steps | trainable parameters | memory | a run | all runs |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {row.task} | {row.setting} | {row.runs} | {row.steps} | "
                f"{row.cost.parameters:,} | {row.at_once * row.cost.bytes / 1e9:.1f} GB | "
                f"{row.seconds:.0f} s | {row.runs * row.seconds / 3600:.1f} h |"
                for row in rows
            ),
            "",
            f"{total / 3600:.1f} h in all, without compilation. Memory is of the runs that are "
            "trained at once, beside the base that they share. Nothing was trained.",
        ]
    )


def measure(
    task: SweepTask, member: Member, schedule: Schedule, batch: Batch, *, microbatches: int = 1
) -> Cost:
    """Takes two steps of a member on its own, on a batch with `input_ids`, and leaves nothing.

    Args:
        task: The task.
        member: The member.
        schedule: That of its run.
        batch: As the task's `batches` has them: a long one, so that the memory is enough for all.
        microbatches: As for `Programs`.
    """
    programs = Programs(Stack(task, [member]), schedule, microbatches=microbatches)
    state = programs.start([member])
    parameters = sum(x.size for x in state.trained)
    arrays = sum(x.nbytes for x in (*state.trained, *state.optimizer))
    seconds = 0.0
    for _ in range(2):  # the first one compiles
        start = time.perf_counter()
        state, outcomes = programs.step(state, [member], [batch])
        jax.block_until_ready(outcomes)
        seconds = time.perf_counter() - start
    return Cost(parameters, arrays + programs.temporary_bytes[1], seconds / tokens_in(batch))
