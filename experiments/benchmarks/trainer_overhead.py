"""Measures what the trainer adds to a bare compiled step: batches, checks, metrics, progress.

The trainer (`experiments/trainer`) and a loop of ten lines take the same steps in turn, in one
process. The loop calls a step that is jitted by hand and does nothing else. With the default
settings it takes about ten minutes on two CPU cores, half of them compiling. Use a quiet machine.

Examples:
    python -m experiments.benchmarks.trainer_overhead
    python -m experiments.benchmarks.trainer_overhead --case minilm --rounds 30
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.steps import METHODS, make_program
from experiments.benchmarks.timing import Times
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.loop import Training, fit
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.run_folder import alone_in, finish_run, provenance
from experiments.trainer.settings import TrainerSettings

DORA = METHODS["dora"]
# Steps at the start of a round that are not timed: the first one starts, with nothing before it.
_LEAD = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the trainer's overhead."""

    # Any of mlp-512, mlp-2048, minilm, llama-7b, llama-7b-full-width, smollm2.
    case: str = "smollm2"
    # Timed rounds. In each, the trainer and the bare loop take `steps` steps each.
    rounds: int = 15
    # Timed steps in a round.
    steps: int = 4
    # Folder of the figures.
    run_folder: Path = Path("runs/trainer_overhead")

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise SystemExit(f"unknown case {self.case!r}: choose from {list(CASES)}")
        if min(self.rounds, self.steps) < 1:
            raise SystemExit("rounds and steps must be at least 1")


@dataclasses.dataclass
class _Watched(Iterator):
    """One batch again and again; notes when each is asked for."""

    batch: Any
    times: list[float] = dataclasses.field(default_factory=list)

    def __next__(self) -> Any:
        self.times.append(time.perf_counter())
        return self.batch

    def seconds_per_step(self) -> float:
        """Returns the mean time between two batches, after the first ones."""
        times = self.times[_LEAD:]
        return (times[-1] - times[0]) / (len(times) - 1)


def measure(case: Case, *, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Returns the seconds per step of both, and their ratio, round by round.

    Args:
        case: The model, its batch and its adapters.
        rounds: Number of timed rounds, after one that compiles.
        steps: Timed steps of each in a round.
        folder: Receives the metrics of the trainer's steps.
    """
    model = case.build()
    calls = {
        "bare": _bare(case, model, _LEAD + steps + 1),
        "trainer": _trainer(case, model, _LEAD + steps + 1, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + rounds):
        for name in sorted(calls, reverse=bool(number % 2)):
            seconds[name].append(calls[name]())
    times = {name: Times(tuple(values[1:])) for name, values in seconds.items()}
    ratio = times["trainer"].over(times["bare"])
    return {
        "case": case.title,
        "rounds": rounds,
        "steps": steps,
        "seconds_per_step": {name: each.median for name, each in times.items()},
        "quartiles": {name: each.quartiles for name, each in times.items()},
        "ratio": ratio.median,
        "ratio_quartiles": ratio.quartiles,
    }


def _bare(case: Case, model: nnx.Module, steps: int) -> Callable[[], float]:
    """Returns a function that takes steps with a step jitted by hand; it waits one step behind."""
    program = make_program(DORA, model, case.adapter, case.loss)
    step = jax.jit(program.step, donate_argnums=(0, 2))
    zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), program.opt_state)
    state = [program.trainable, zeros]

    def run() -> float:
        batches, before = _Watched(case.batch), None
        for _ in range(steps):
            batch = next(batches)
            state[0], state[1], loss = step(state[0], program.frozen, state[1], batch)
            jax.block_until_ready(before)
            before = loss
        jax.block_until_ready((before, state))
        return batches.seconds_per_step()

    return run


def _trainer(case: Case, base: nnx.Module, steps: int, folder: Path) -> Callable[[], float]:
    """Returns a function that takes steps with the trainer."""
    model = DORA.adapt(base, case.adapter, seed=1)
    optimizer = nnx.Optimizer(model, DORA.optimizer(), wrt=DORA.trainable)

    def loss(model: Any, batch: Any) -> Any:
        return case.loss(model, batch), {}

    def run() -> float:
        batches = _Watched(case.batch)
        training = Training(
            model=model, optimizer=optimizer, loss=loss, batches=batches, steps=steps
        )
        fit(training, folder, TrainerSettings())
        return batches.seconds_per_step()

    return run


def main() -> None:
    """Reads the settings from the command line and measures."""
    keep_freed_memory()
    config = settings(Config, __doc__)
    with in_one_line("Nothing is kept: start again."), alone_in(config.run_folder):
        TrainerSettings().set_up()
        case = CASES[config.case]()
        figures = measure(case, rounds=config.rounds, steps=config.steps, folder=config.run_folder)
        finish_run(config.run_folder, figures | {"made": provenance()})
    low, high = figures["ratio_quartiles"]
    seconds = figures["seconds_per_step"]
    print(f"\n{case.title}: seconds per step")
    print(f"  bare     {seconds['bare']:.4f}")
    print(f"  trainer  {seconds['trainer']:.4f}")
    print(f"  ratio    {figures['ratio']:.4f}   (quartiles {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
