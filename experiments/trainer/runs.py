"""Training runs that keep their results on disk, so that none is trained twice."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from experiments.tasks.task import Task
from experiments.trainer.classification import (
    Schedule,
    classifier_training,
    count,
    evaluate,
    example_call,
    logits_of,
)
from experiments.trainer.loop import fit
from experiments.trainer.methods import METHODS
from experiments.trainer.run_folder import finish_run, finished_run, start_run
from experiments.trainer.settings import TrainerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that the result of a run depends on.

    Attributes:
        rank: Rank of the adapters.
        alpha: The scaling of the adapters is `alpha / rank`.
        magnitude_lr_ratio: Learning rate of the magnitude over `learning_rate`.
        epochs: Passes over the training texts.
        batch_size: Texts per step.
        train_examples: Number of training texts.
        max_length: Tokens per text.
        method: A name in `methods.METHODS`.
        learning_rate: The peak.
        seed: Seed of the new head, the adapters and the order of the texts.
        checkpoint: The checkpoint folder of the pretrained model. None means MiniLM.
        trainer: How the training runs.
    """

    rank: int
    alpha: float
    magnitude_lr_ratio: float
    epochs: int
    batch_size: int
    train_examples: int
    max_length: int
    method: str
    learning_rate: float
    seed: int
    checkpoint: Path | None = None
    trainer: TrainerSettings = dataclasses.field(default_factory=TrainerSettings)

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as `config.json` holds them."""
        fields = dataclasses.asdict(self) | {"checkpoint": str(self.checkpoint or "MiniLM")}
        del fields["trainer"]
        return fields | self.trainer.changes_results

    def schedule(self) -> Schedule:
        """Returns the schedule of the run."""
        return Schedule(self.learning_rate, self.epochs, self.batch_size, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, and the folder that holds its results.

    Attributes:
        settings: Everything that the result depends on.
        folder: As `run_folder` describes it, with `test_logits.npy`. It has no checkpoints: an
            interrupted run starts anew.
    """

    settings: RunSettings
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """Returns the summary of the finished run, or None if it has not finished.

        Raises:
            SystemExit: The folder holds a run of other settings.
        """
        return finished_run(self.folder, self.settings.as_json())

    def test_accuracy(self, task: Task) -> float:
        """Returns the test accuracy, computed from the logits that the finished run stored."""
        logits = np.load(self.folder / "test_logits.npy")
        return float((logits.argmax(-1) == task.test.labels).mean())

    def train(self, task: Task, title: str) -> dict[str, Any]:
        """Trains, writes the summary and the logits of the test texts, and returns the summary.

        The test labels are not used.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start_run(self.folder, self.settings.as_json())
        model, optimizer = self.build(task)
        schedule, trainer = self.settings.schedule(), self.settings.trainer
        training = classifier_training(model, optimizer, task, schedule, trainer, title=title)
        fit(training, self.folder, trainer)
        np.save(self.folder / "test_logits.npy", logits_of(model, task.test))
        summary = {
            "validation": evaluate(model, task.validation),
            "trainable_parameters": count(model, METHODS[self.settings.method].trainable),
        }
        finish_run(self.folder, summary)
        return summary

    def build(self, task: Task) -> tuple[nnx.Module, nnx.Optimizer]:
        """Returns the model, adapted if the method adapts it, and its optimiser."""
        settings = self.settings
        method = METHODS[settings.method]
        model = method.adapt(
            task.model(settings.seed, **settings.trainer.switches(task.model)),
            rank=settings.rank,
            alpha=settings.alpha,
            seed=1000 + settings.seed,
            call=example_call(task.train),
        )
        steps = settings.epochs * settings.schedule().steps_per_epoch(task.train)
        schedule = dataclasses.replace(settings.schedule(), seed=0)
        tx = _optimizer(settings.method, schedule, settings.magnitude_lr_ratio, steps)
        return model, nnx.Optimizer(model, tx, wrt=method.trainable)


@functools.cache
def _optimizer(
    method: str, schedule: Schedule, magnitude_lr_ratio: float, steps: int
) -> optax.GradientTransformation:
    """Returns one optimiser for all seeds: JAX would compile the step again for a new one."""
    return METHODS[method].optimizer(schedule.over(steps), magnitude_lr_ratio)
