"""A sweep at a glance: a row for each method, a column for each task, and the average."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.reporting.statistics import Interval, mean_interval, paired_interval
from experiments.reporting.tables import Cell, Column, Table
from experiments.reporting.variants import Variant, reference_of
from experiments.trainer.methods import METHODS

_HUNDRED = 100.0


def overview(found: Sequence[Variant], reference: str) -> Table | None:
    """Returns the table of the variants of one experiment; None if they have one task.

    Only a variant that has every task has an average. Its interval is over the seeds that all its
    tasks have; that of the difference over those that both have.
    """
    tasks = list(dict.fromkeys(variant.task for variant in found))
    if len(tasks) < 2:
        return None
    groups: dict[tuple[str, str], dict[str, Variant]] = {}
    for variant in found:
        groups.setdefault((variant.title, variant.setting), {})[variant.task] = variant
    averages = {key: _averages(of, tasks) for key, of in groups.items()}
    rows: list[tuple[Cell, ...]] = []
    for key, of in groups.items():
        other = reference_of(next(iter(of.values())), found, reference)
        against = {} if other is None else averages[other.title, other.setting]
        rows.append(
            (
                *key,
                *(of[task].score().value * _HUNDRED if task in of else None for task in tasks),
                mean_interval(list(averages[key].values())).scaled(_HUNDRED),
                _difference(averages[key], against),
            )
        )
    metrics = {variant.task: variant.metric for variant in found}
    columns = (
        *(Column("method"), Column("setting")),
        *(Column(f"{task} ({metrics[task]})", 2) for task in tasks),
        Column("average", 2),
        Column(f"average minus {METHODS[reference].title}", 2, signed=True),
    )
    caption = (
        "Means over seeds (× 100). Only a method that has every task has an average; its interval "
        "is Student's, over the seeds that all tasks have."
    )
    return Table(columns, tuple(rows), caption).without_empty_columns()


def _averages(of: dict[str, Variant], tasks: Sequence[str]) -> dict[int, float]:
    """Returns the average over tasks by seed; nothing if a task is missing."""
    if of.keys() != set(tasks):
        return {}
    scores = [variant.scores() for variant in of.values()]
    seeds = sorted(set.intersection(*(set(s) for s in scores)))
    return {seed: sum(s[seed] for s in scores) / len(scores) for seed in seeds}


def _difference(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    return paired_interval([one[s] for s in seeds], [other[s] for s in seeds]).scaled(_HUNDRED)
