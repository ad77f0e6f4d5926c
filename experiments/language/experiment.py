"""A comparison of methods on a decoder: its runs, their order, and what they leave."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from experiments.language.answers import Encoded
from experiments.language.runs import LanguageRun, Recipe
from experiments.sweeps.choice import choose
from experiments.sweeps.members import Member
from experiments.trainer.run_folder import finish_run, finished_run, start_run, write_whole
from experiments.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from experiments.models.llama import Llama

Split = Literal["validation", "test"]


class Result(NamedTuple):
    """An evaluation.

    Attributes:
        metrics: `accuracy`, the mean over the tasks, `<task>/accuracy`, and others.
        predictions: By example, the number of the chosen answer, or the answer itself.
        labels: The right ones.
        task: The key of each example's task.
    """

    metrics: dict[str, float]
    predictions: Shaped[np.ndarray, " example"]
    labels: Shaped[np.ndarray, " example"]
    task: Shaped[np.ndarray, " example"]


class Material(Protocol):
    """What the runs of a comparison are trained and evaluated on."""

    @property
    def train(self) -> Sequence[Encoded]:
        """The rows to train on."""
        ...

    def evaluate(self, model: Llama, split: Split) -> Result:
        """Evaluates a decoder with plain layers."""
        ...

    def loss_on_unrelated(self, model: Llama) -> float | None:
        """Returns nats a token of texts that no run is tuned on; None if there are none."""
        ...


def joined(parts: Sequence[tuple[str, dict[str, float], np.ndarray, np.ndarray]]) -> Result:
    """Returns the result on several tasks, from each task's key, metrics, predictions and labels.

    Example:
        >>> one = ("a", {"accuracy": 1.0}, np.array([1]), np.array([1]))
        >>> joined([one, ("b", {"accuracy": 0.5}, np.array([0, 1]), np.array([0, 0]))]).metrics
        {'accuracy': 0.75, 'a/accuracy': 1.0, 'b/accuracy': 0.5}
    """
    metrics = {name: statistics.fmean(part[1][name] for part in parts) for name in parts[0][1]}
    for task, own, *_ in parts:
        metrics.update({f"{task}/{name}": value for name, value in own.items()})
    return Result(
        metrics,
        np.concatenate([part[2] for part in parts]),
        np.concatenate([part[3] for part in parts]),
        np.concatenate([np.full(len(part[3]), part[0]) for part in parts]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """Which runs a comparison has.

    Attributes:
        folder: Of the run folders.
        methods: Names in `METHODS`.
        rates: Learning rates that every method tries.
        choosing_seeds: Seeds of each rate, if there are several rates.
        seeds: Seeds at the chosen rate, the others included.
        recipe: What all runs have in common.
        about: Further settings on which results depend, for `config.json`.
        trainer: Devices and precision.
    """

    folder: Path
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    choosing_seeds: int
    seeds: int
    recipe: Recipe
    about: Mapping[str, Any]
    trainer: TrainerSettings

    @property
    def runs_of_a_method(self) -> int:
        """How many runs each method has, if the chosen rate's first seeds are among them."""
        if len(self.rates) == 1:
            return self.seeds
        return len(self.rates) * self.choosing_seeds + max(0, self.seeds - self.choosing_seeds)


class Experiment:
    """The runs of a comparison, on loaded rows and a loaded decoder.

    The mean validation accuracy over the choosing seeds selects a learning rate for each method.
    Only runs at that rate are tested, each once.
    """

    def __init__(self, design: Design, material: Material, base: Llama) -> None:
        self.design, self.material, self.base = design, material, base

    def run(self, after_a_seed: Callable[[], None] = lambda: None) -> None:
        """Trains and tests what has no result yet, the base first.

        Args:
            after_a_seed: Called when all methods were tested with one more seed.
        """
        design = self.design
        unrelated = self._evaluate_base()
        for seed in range(design.choosing_seeds if len(design.rates) > 1 else 0):
            for rate in design.rates:
                for method in design.methods:
                    self._train(self.run_of(method, rate, seed), unrelated)
        for seed in range(design.seeds):
            for method in design.methods:
                run = self.run_of(method, self.chosen(method), seed)
                diverged = "diverged" in self._train(run, unrelated)
                if not diverged and not (run.folder / "test.json").exists():
                    self._test(run.folder, run.trained(self.base))
            after_a_seed()

    def run_of(self, method: str, rate: float, seed: int) -> LanguageRun:
        """Returns a run of the comparison."""
        design = self.design
        rank = design.recipe.adapters(method).rank
        name = f"{method}_r{rank}_lr-{rate:g}_seed-{seed}"
        return LanguageRun(
            folder=design.folder / name,
            method=method,
            learning_rate=rate,
            seed=seed,
            recipe=design.recipe,
            about=design.about,
            trainer=design.trainer,
        )

    def chosen(self, method: str) -> float:
        """Returns the learning rate that the choosing seeds select on the validation rows."""
        rates = self.design.rates
        if len(rates) == 1:
            return rates[0]
        found = {}
        for rate in rates:
            for seed in range(self.design.choosing_seeds):
                summary = self.run_of(method, rate, seed).summary()
                assert summary is not None  # trained before
                # Generated answers have no loss.
                figures = {"validation": {"loss": 0.0, **summary["validation"]}}
                found[Member(method=method, learning_rate=rate, seed=seed)] = figures
        return choose(found, "accuracy")[0]

    def _train(self, run: LanguageRun, unrelated: float | None) -> dict[str, Any]:
        if (summary := run.summary()) is not None:
            return summary
        material = self.material

        def forgetting(model: Llama) -> float | None:
            loss = material.loss_on_unrelated(model)
            return None if loss is None or unrelated is None else loss - unrelated

        summary = run.train(
            self.base,
            material.train,
            validate=lambda model: material.evaluate(model, "validation").metrics,
            forgetting=forgetting,
        )
        figures = {k: v for k, v in summary["validation"].items() if "/" not in k}
        print(f"{run.title}: {summary.get('diverged', figures)}", flush=True)
        return summary

    def _evaluate_base(self) -> float | None:
        """Evaluates the decoder untrained; returns its loss on the unrelated texts."""
        design = self.design
        folder = design.folder / "base_r0_lr-0_seed-0"
        own = {"method": "base", "rank": 0, "alpha": 0.0, "learning_rate": 0.0, "seed": 0}
        config = {**design.about, **own, "train_examples": 0, "epochs": 0, "steps": 0}
        config |= design.trainer.changes_results
        summary = finished_run(folder, config)
        if summary is None:
            folder.mkdir(parents=True, exist_ok=True)
            start_run(folder, config)
            summary = {
                "validation": self.material.evaluate(self.base, "validation").metrics,
                "metric": "accuracy",
                "trainable_parameters": 0,
                "seconds_per_step": None,
                "members": 1,
                "temporary_bytes": None,
                "forgetting": None,
                "unrelated_loss": self.material.loss_on_unrelated(self.base),
            }
            finish_run(folder, summary)
        if not (folder / "test.json").exists():
            self._test(folder, self.base)
        loss: float | None = summary["unrelated_loss"]
        return loss

    def _test(self, folder: Path, model: Llama) -> None:
        result = self.material.evaluate(model, "test")
        arrays = {"predictions": result.predictions, "labels": result.labels, "task": result.task}
        np.savez(folder / "test_predictions.npz", **arrays)  # type: ignore[arg-type]
        figures = {**result.metrics, "examples": len(result.labels)}
        write_whole(folder / "test.json", json.dumps(figures, indent=2) + "\n")
