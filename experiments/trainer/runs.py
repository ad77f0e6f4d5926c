"""Training runs that keep their results on disk, so that none is trained twice."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from experiments.tasks.metrics import MetricsWriter
from experiments.tasks.task import Task
from experiments.trainer.methods import METHODS
from experiments.trainer.run_folder import write_whole
from experiments.trainer.training import Schedule, count, evaluate, example_call, fit, logits_of


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

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as `result.json` holds them, without `checkpoint` if it is None."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}

    def schedule(self) -> Schedule:
        """Returns the schedule of the run."""
        return Schedule(self.learning_rate, self.epochs, self.batch_size, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, and the folder that holds its results.

    Attributes:
        settings: Everything that the result depends on.
        folder: Holds `result.json`, `test_logits.npy` and the metrics.
    """

    settings: RunSettings
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """Returns the result of the finished run, or None if it has not finished.

        Raises:
            SystemExit: The folder holds a run of other settings.
        """
        file = self.folder / "result.json"
        if not file.exists():
            return None
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["settings"] != self.settings.as_json():
            raise SystemExit(
                f"{self.folder} holds a run of other settings: choose another --run-folder"
            )
        return result

    def test_accuracy(self, task: Task) -> float:
        """Returns the test accuracy, computed from the logits that the finished run stored."""
        logits = np.load(self.folder / "test_logits.npy")
        return float((logits.argmax(-1) == task.test.labels).mean())

    def train(self, task: Task, title: str) -> dict[str, Any]:
        """Trains, writes the result and the logits of the test texts, and returns the result.

        The test labels are not used.
        """
        model, optimizer = self.build(task)
        metrics = self.folder / f"metrics-{time.time_ns()}"  # an interrupted attempt has its own
        with MetricsWriter(metrics) as writer:
            fit(model, optimizer, task, self.settings.schedule(), writer, title=title)
        np.save(self.folder / "test_logits.npy", logits_of(model, task.test))
        result = {
            "settings": self.settings.as_json(),
            "validation": evaluate(model, task.validation),
            "trainable_parameters": count(model, METHODS[self.settings.method].trainable),
        }
        write_whole(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        return result

    def build(self, task: Task) -> tuple[nnx.Module, nnx.Optimizer]:
        """Returns the model, adapted if the method adapts it, and its optimiser."""
        settings = self.settings
        method = METHODS[settings.method]
        model = method.adapt(
            task.model(settings.seed),
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
