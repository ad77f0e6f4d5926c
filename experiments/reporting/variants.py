"""Runs grouped by what is compared: the choice of the learning rate, and the scores."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.reporting.folders import FinishedRun
from experiments.reporting.statistics import (
    Interval,
    bootstrap_difference,
    mean_interval,
    paired_interval,
)
from experiments.tasks import scores
from experiments.trainer.methods import METHODS

if TYPE_CHECKING:
    from jaxtyping import Shaped

# What tells one run of a variant from another, and what follows from the rest.
_NOT_SETTINGS = {
    *("experiment", "task", "model", "method", "rank", "alpha", "learning_rate", "seed"),
    *("steps", "warmup", "checkpoint"),
}
METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": scores.accuracy,
    "f1": scores.f1,
    "matthews": scores.matthews,
    "pearson": scores.pearson,
    "spearman": scores.spearman,
}
"""Metrics that can be computed from predictions."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs of one task, method, rank and other settings; they differ in rate and seed.

    Attributes:
        experiment, task, model, method, rank: As the runs have them.
        settings: Further settings in which it differs from most runs of the task, as pairs.
        runs: The runs.
    """

    experiment: str
    task: str
    model: str
    method: str
    rank: int
    settings: tuple[tuple[str, Hashable], ...]
    runs: tuple[FinishedRun, ...]

    @property
    def title(self) -> str:
        """The method, and its rank if it has one."""
        title = METHODS[self.method].title if self.is_trained else "not fine-tuned"
        return f"{title}, r {self.rank}" if self.rank else title

    @property
    def is_trained(self) -> bool:
        """Whether it is one of `METHODS`, and not the base as it is."""
        return self.method in METHODS

    @property
    def setting(self) -> str:
        """The further settings as text."""
        return ", ".join(f"{name} {x}" for name, x in self.settings) if self.is_trained else ""

    @property
    def metric(self) -> str:
        """The metric that selects."""
        return self.runs[0].metric

    @functools.cached_property
    def curve(self) -> dict[float, dict[int, float]]:
        """The validation metric by learning rate and seed."""
        found: dict[float, dict[int, float]] = {}
        for run in sorted(self.runs, key=lambda r: (r.config["learning_rate"], r.config["seed"])):
            rates = found.setdefault(run.config["learning_rate"], {})
            rates[run.config["seed"]] = run.validation()
        return found

    @functools.cached_property
    def selection_seeds(self) -> list[int]:
        """The seeds that were trained at every rate: those that can choose among them."""
        return sorted(set.intersection(*(set(seeds) for seeds in self.curve.values())))

    @functools.cached_property
    def best_rate(self) -> float:
        """The rate with the best mean validation metric over the selection seeds.

        Of equal ones that with the lower validation loss is better.
        """

        def rank(rate: float) -> tuple[float, float]:
            runs = [r for r in self.runs if r.config["learning_rate"] == rate]
            runs = [r for r in runs if r.config["seed"] in self.selection_seeds] or runs
            score, loss = (
                float(np.mean([r.validation(name) for r in runs])) for name in (self.metric, "loss")
            )
            return (
                -math.inf if math.isnan(score) else score,
                -math.inf if math.isnan(loss) else -loss,
            )

        return max(self.curve, key=rank)

    @functools.cached_property
    def rate(self) -> float:
        """The rate that is reported: that of the runs with test scores, or else the best one."""
        tested = {run.config["learning_rate"] for run in self.runs if run.test is not None}
        return max(tested, key=lambda rate: (rate == self.best_rate, rate), default=self.best_rate)

    @property
    def at_edge(self) -> bool | None:
        """Whether the rate is the lowest or the highest that was tried; None if it was the only."""
        return None if len(self.curve) == 1 else self.rate in (min(self.curve), max(self.curve))

    @functools.cached_property
    def final(self) -> dict[int, FinishedRun]:
        """The runs that are reported, by seed: those with test scores, if there are any."""
        chosen = [run for run in self.runs if run.config["learning_rate"] == self.rate]
        tested = [run for run in chosen if run.test is not None]
        return {run.config["seed"]: run for run in tested or chosen}

    @property
    def is_tested(self) -> bool:
        """Whether the scores are of the test split, not of the validation split."""
        return any(run.test is not None for run in self.final.values())

    def scores(self, metric: str | None = None) -> dict[int, float]:
        """Returns a metric by seed: on the test split, or on the validation split if untested."""
        get = FinishedRun.test_score if self.is_tested else FinishedRun.validation
        return {seed: get(run, metric) for seed, run in sorted(self.final.items())}

    def score(self) -> Interval:
        """Returns the mean over seeds with Student's interval."""
        return mean_interval(list(self.scores().values()))

    def mean_of(self, field: str) -> Interval:
        """Returns the mean of a field of the summaries of the final runs; NaN if it has none."""
        values = [run.summary.get(field) for run in self.final.values()]
        numbers = [float(x) for x in values if isinstance(x, int | float)]
        return mean_interval(numbers)


def variants(runs: Iterable[FinishedRun]) -> list[Variant]:
    """Returns the variants, in the order of the tasks and of `METHODS`.

    A field of `config.json` counts as a setting where it differs from its most frequent value in
    the experiment and task; alpha, if alpha over rank does.
    """
    by_task: dict[tuple[str, str, str], list[FinishedRun]] = {}
    for run in runs:
        key = tuple(str(run.config[name]) for name in ("experiment", "task", "model"))
        by_task.setdefault(key, []).append(run)  # type: ignore[arg-type]
    order = list(METHODS)
    found: list[Variant] = []
    for (experiment, task, model), members in sorted(by_task.items()):
        usual = _usual(members)
        groups: dict[Any, list[FinishedRun]] = {}
        for run in members:
            own_values = ((name, _of(run, name)) for name in usual)
            settings = tuple((name, x) for name, x in own_values if x != usual[name])
            groups.setdefault((run.config["method"], run.config["rank"], settings), []).append(run)
        own = [
            Variant(experiment, task, model, method, rank, settings, tuple(group))
            for (method, rank, settings), group in groups.items()
        ]
        known = {method: i for i, method in enumerate(order)}
        own.sort(key=lambda v: (known.get(v.method, len(known)), v.method, v.rank, v.setting))
        found += own
    return found


def reference_of(variant: Variant, others: Sequence[Variant], method: str) -> Variant | None:
    """Returns the variant of a method that another one is compared with, None if there is none.

    It is of the same experiment, task and model. The one whose settings differ least comes first,
    then that of the same rank, then that of the largest.
    """
    where = (variant.experiment, variant.task, variant.model)
    found = [v for v in others if v.method == method and (v.experiment, v.task, v.model) == where]
    if variant in found:
        return None
    own = set(variant.settings)
    return max(
        found,
        key=lambda v: (-len(own ^ set(v.settings)), v.rank == variant.rank, v.rank),
        default=None,
    )


def over_seeds(one: Variant, other: Variant) -> Interval:
    """Returns the difference of the scores, paired over the seeds that both have."""
    a, b = one.scores(), other.scores()
    seeds = sorted(a.keys() & b.keys())
    if one.is_tested != other.is_tested or not seeds:
        return Interval(math.nan, math.nan, math.nan)
    return paired_interval([a[seed] for seed in seeds], [b[seed] for seed in seeds])


def over_examples(one: Variant, other: Variant) -> Interval | None:
    """Returns the difference of the test metric over the choice of examples.

    None if a variant has no predictions, if their labels differ, or if the metric is not known.

    Raises:
        ReportError: A file of predictions is damaged.
    """
    if one.metric not in METRICS:
        return None
    found: list[list[Shaped[np.ndarray, " example"]]] = []
    labels: Shaped[np.ndarray, " example"] | None = None
    for variant in (one, other):
        arrays = [run.predictions() for run in variant.final.values()]
        of_variant = []
        for array in arrays:
            if array is None:
                return None
            labels = array["labels"] if labels is None else labels
            if not np.array_equal(labels, array["labels"]):
                return None
            of_variant.append(array["predictions"])
        found.append(of_variant)
    assert labels is not None
    return bootstrap_difference(METRICS[one.metric], labels, *found)


def _usual(runs: Sequence[FinishedRun]) -> dict[str, Hashable]:
    """Returns the most frequent value of each setting that differs between runs."""
    names = sorted({name for run in runs for name in run.config} - _NOT_SETTINGS)
    scalings = {r.config["alpha"] / r.config["rank"] for r in runs if _has_alpha(r)}
    values = {name: Counter(_of(run, name) for run in runs) for name in names}
    if len(scalings) > 1:
        values["alpha"] = Counter(_of(run, "alpha") for run in runs)
    return {name: of.most_common(1)[0][0] for name, of in values.items() if len(of) > 1}


def _has_alpha(run: FinishedRun) -> bool:
    return bool(run.config["rank"]) and isinstance(run.config.get("alpha"), int | float)


def _of(run: FinishedRun, name: str) -> Hashable:
    value = run.config.get(name)
    return (
        tuple(map(str, value))
        if isinstance(value, list)
        else (str(value) if isinstance(value, dict) else value)
    )
