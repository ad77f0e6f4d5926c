"""The training loop: steps, progress, metrics, evaluations, checkpoints, and an orderly end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import dora_jax as dora
from experiments.tasks.metrics import METRICS_FILE, MetricsWriter, read_metrics
from experiments.trainer.finite import check_evaluation, check_finite
from experiments.trainer.flops import flops_per_token, peak_flops
from experiments.trainer.placement import place, place_batch
from experiments.trainer.progress import Progress, Speed, tokens_in
from experiments.trainer.settings import TrainerSettings
from experiments.trainer.signals import Asked, InterruptedStepError, deferred
from experiments.trainer.step import Loss, Outcome, TrainStep
from experiments.trainer.trace import Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, on what, and for how long.

    Attributes:
        model: The model, adapted if adapters are trained.
        optimizer: Its optimiser; `optimizer.wrt` selects what is trained.
        loss: `loss(model, batch) -> (loss, metrics)`, see `step.Loss`.
        batches: An iterator of pytrees of NumPy arrays, with the rows of this process
            (`placement.own_rows`). Its `get_state()` and `set_state()` are for checkpoints.
        steps: Number of steps, those before an interruption included.
        config: The configuration of the adapters. With it, the run is saved and can be resumed.
        checkpoint_every: Steps between two checkpoints. The last step is saved too.
        evaluate: Returns figures of a model, which it leaves as it is. None evaluates nothing.
        evaluate_every: Steps between two evaluations; 0 evaluates after the last step alone.
        best: A figure of the evaluation. The adapters for which it is smallest are kept in `best/`.
        title: The name in the progress line.
    """

    model: nnx.Module
    optimizer: nnx.Optimizer
    loss: Loss
    batches: Iterator[Any]
    steps: int
    config: dora.DoRAConfig | None = None
    checkpoint_every: int = 50
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    evaluate_every: int = 0
    best: str | None = None
    title: str = "training"

    def __post_init__(self) -> None:
        if self.best is not None and (self.config is None or self.evaluate is None):
            raise ValueError("best needs config and evaluate: adapters are kept, by a figure")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` did.

    Attributes:
        resumed_from_step: The step of the checkpoint at the start; 0 if there was none.
        seconds_per_step: The median, without the first two steps of this process, which compile.
            None if it took no others.
    """

    resumed_from_step: int
    seconds_per_step: float | None


def fit(training: Training, folder: Path, settings: TrainerSettings | None = None) -> Fitted:
    """Trains a model in place, and leaves metrics and checkpoints in a folder.

        folder/metrics.jsonl, events.*    metrics by step, as JSON lines and for TensorBoard
        folder/checkpoints/               to resume from
        folder/best/                      the best adapters: dora.load

    A run whose folder has checkpoints resumes from the newest, and ends with the same bits as an
    uninterrupted one. SIGTERM and Ctrl-C save the step that is running before they end the run; an
    evaluation is finished first.

    While a step runs, the one before it is checked and its metrics are written. Steps are checked
    before they are saved: no checkpoint holds a number that is not finite.

    Raises:
        DivergedError: A loss, a gradient or an evaluation is not finite. The model is then of no
            use; the checkpoints and the metrics are those of the steps before.
        InterruptedStepError: A signal came, and there is a `config`: what was reached is saved.
        SettingsError, MeshError: The settings do not fit the devices or the batches.
    """
    settings = settings or TrainerSettings()
    mesh = settings.device_mesh()
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            place(training.model, training.optimizer, mesh)
            stack.enter_context(jax.set_mesh(mesh))
        checkpoints, first = None, 0
        if training.config is not None:
            store = dora.Checkpoints(folder / "checkpoints", training.config)
            checkpoints = stack.enter_context(store)
            state, data = training.optimizer, training.batches
            restored = checkpoints.restore(training.model, state, data=data)
            first = restored.step if restored else 0
        loop = _Loop(training, folder, settings, mesh, checkpoints)
        return Fitted(first, loop.run(first))


class _Loop:
    """A run of `fit`: everything that a step needs beside its own arrays."""

    def __init__(
        self,
        training: Training,
        folder: Path,
        settings: TrainerSettings,
        mesh: jax.sharding.Mesh | None,
        checkpoints: dora.Checkpoints | None,
    ) -> None:
        self.training, self.folder, self.mesh = training, folder, mesh
        self.checkpoints, self.trace = checkpoints, Trace(settings.profile)
        model, optimizer = training.model, training.optimizer
        model.train()
        self.step = TrainStep(model, optimizer, training.loss, microbatches=settings.microbatches)
        flops = flops_per_token(model, optimizer.wrt)
        self.speed = Speed(0, flops, peak_flops(1 if mesh is None else mesh.size))
        self.seconds: list[float] = []
        self.unreported: tuple[int, Outcome] | None = None
        self.clock = 0.0
        self.best = math.inf
        self.writer: MetricsWriter | None = None

    def run(self, first: int) -> float | None:
        """Takes the steps after the first ones; returns the median seconds of a step."""
        training, leads = self.training, jax.process_index() == 0
        self.best = self._best_until(first)
        with contextlib.ExitStack() as stack:
            if leads:
                writer = MetricsWriter(self.folder, resume_step=first + 1)
                self.writer = stack.enter_context(writer)
            bar = Progress(training.title, training.steps, first, shown=leads)
            self.progress = stack.enter_context(bar)
            stack.callback(self.step.write_back)
            stack.enter_context(self.trace)
            asked = Asked()
            if self.checkpoints is not None:
                asked = stack.enter_context(deferred())
            for number in range(first + 1, training.steps + 1):
                self._take(number, compiles=number == first + 1)
                self._end_of_step(number, asked)
            if asked.number is not None:
                raise InterruptedStepError(asked.number, training.steps)
        return float(np.median(self.seconds[2:])) if len(self.seconds) > 2 else None

    def _take(self, number: int, *, compiles: bool) -> None:
        """Starts a step, and reports the one before while it runs."""
        if self.trace.at_an_edge:
            self._report()
        if self.unreported is None:
            self.clock = time.perf_counter()
        batch = next(self.training.batches)
        self.speed.tokens = tokens_in(batch) * jax.process_count()
        if self.mesh is not None:
            batch = place_batch(batch, self.mesh)
        shown = self.progress.compiling() if compiles else contextlib.nullcontext()
        with shown, self.trace.step(number):
            outcome = self.step(batch)
        self._report()
        self.unreported = number, outcome

    def _report(self) -> None:
        """Waits for the step that has no report yet, checks it, and writes its metrics."""
        if self.unreported is None:
            return
        number, outcome = self.unreported
        self.unreported = None
        loss, metrics, squares = jax.device_get(outcome)
        check_finite(number, float(loss), squares, self.training.model, self.training.optimizer.wrt)
        now = time.perf_counter()
        self.seconds.append(now - self.clock)
        self.clock = now
        if len(self.seconds) > 1:  # the first one compiled
            self.speed.add(self.seconds[-1])
        values = {"loss": float(loss), **{name: float(x) for name, x in metrics.items()}}
        if self.writer:
            self.writer.write(number, "train", values)
        self.progress.step(values, self.speed)

    def _end_of_step(self, number: int, asked: Asked) -> None:
        """Evaluates and saves where that is due, or where a signal asks the run to end."""
        training, last = self.training, number == self.training.steps
        every = training.evaluate_every
        evaluates = training.evaluate and (last or (every and number % every == 0))
        saves = self.checkpoints and (last or number % training.checkpoint_every == 0)
        if not (asked.at(number) is not None or last or evaluates or saves):
            return
        self._report()
        self.step.write_back()
        if evaluates:
            self._evaluate(number)
        if self.checkpoints and (saves or asked.number is not None):
            optimizer, batches = training.optimizer, training.batches
            self.checkpoints.save(number, training.model, optimizer, data=batches)
        if self.checkpoints and asked.number is not None:
            self.checkpoints.wait()
            raise InterruptedStepError(asked.number, number)

    def _evaluate(self, number: int) -> None:
        training = self.training
        assert training.evaluate is not None
        values = {name: float(x) for name, x in training.evaluate(training.model).items()}
        check_evaluation(number, values)
        if training.best is not None and values[training.best] < self.best:
            assert training.config is not None  # checked by `Training`
            self.best = values[training.best]
            dora.save(self.folder / "best", training.model, training.config, overwrite=True)
        if self.writer:
            self.writer.write(number, "validation", values)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.progress.say(f"step {number} of {training.steps}: validation {figures}")

    def _best_until(self, step: int) -> float:
        """Returns the best figure of the evaluations up to a step, from the metrics on disk."""
        if self.training.best is None or not (self.folder / METRICS_FILE).exists():
            return math.inf
        lines = read_metrics(self.folder)
        found = [line for line in lines if line["split"] == "validation" and line["step"] <= step]
        return min((line[self.training.best] for line in found), default=math.inf)
