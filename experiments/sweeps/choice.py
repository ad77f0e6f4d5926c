"""The choice of a learning rate on the validation examples, and the runs that see the test."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.sweeps.members import Member
from experiments.sweeps.runner import Sweep


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What was chosen for one setting, and how well it does.

    Attributes:
        members: The members at the chosen rate, one for each seed.
        at_edge: Whether the rate is the lowest or the highest of those that were tried.
        validation: The mean metric of each rate on the validation examples; None if a run diverged.
        summaries: Those of `members`.
        test: The metrics of `members` on the test split.
    """

    members: list[Member]
    at_edge: bool
    validation: dict[float, float | None]
    summaries: list[dict[str, Any]]
    test: list[dict[str, float]]

    @property
    def learning_rate(self) -> float:
        """The chosen rate."""
        return self.members[0].learning_rate


def tune(
    sweep: Sweep, settings: Sequence[Member], rates: Sequence[float], choosing: int, seeds: int
) -> dict[Member, Chosen]:
    """Chooses the rate of each setting, trains all seeds at it, and tests these alone.

    Each rate is tried with the first `choosing` seeds, and that with the best mean is chosen.

    Args:
        sweep: Trains and keeps the runs.
        settings: Members; their own rates and seeds are not used.
        rates: Learning rates that each of them tries.
        choosing: Number of seeds that choose.
        seeds: Number of seeds at the chosen rate, those that chose included.
    """
    found: dict[Member, Chosen] = {}
    for family in sweep.families(settings):
        tried = [at(m, rate, s) for m in family for rate in rates for s in range(choosing)]
        summaries = sweep.run(tried)
        best = {
            own: choose(
                {m: s for m, s in summaries.items() if at(m, 1, 0) == at(own, 1, 0)},
                sweep.task.metric,
            )
            for own in family
        }
        final = {own: [at(own, best[own][0], s) for s in range(seeds)] for own in family}
        every = [member for own in final.values() for member in own]
        summaries = sweep.run(every)
        sweep.forget([member for member in tried if member not in every])
        scores = sweep.test(every)
        for own, (rate, validation) in best.items():
            found[own] = Chosen(
                final[own],
                rate in (min(rates), max(rates)),
                validation,
                [summaries[m] for m in final[own]],
                [scores[m] for m in final[own]],
            )
    return {own: found[own] for own in settings}


def choose(
    summaries: Mapping[Member, Mapping[str, Any]], metric: str
) -> tuple[float, dict[float, float | None]]:
    """Returns the learning rate with the best mean of a validation metric, and all the means.

    Of two with equal means, the one with the lower mean loss is better. A rate at which a run
    diverged is worse than all others, and its mean is None.

    Args:
        summaries: Of the members of one setting, for each rate the same seeds.
        metric: Higher is better.

    Example:
        >>> runs = {
        ...     Member(learning_rate=r, seed=s): {"validation": {"f1": x, "loss": 1.0}}
        ...     for r, s, x in ((1e-3, 0, 0.5), (1e-3, 1, 0.7), (1e-2, 0, 0.9), (1e-2, 1, None))
        ... }
        >>> choose(runs, "f1")
        (0.001, {0.001: 0.6, 0.01: None})
    """
    by_rate: dict[float, list[tuple[float, float]]] = {}
    for member, summary in summaries.items():
        values = [summary["validation"][name] for name in (metric, "loss")]
        score, loss = (-math.inf, math.inf) if None in values else values
        by_rate.setdefault(member.learning_rate, []).append((score, -loss))
    means = {
        rate: tuple(map(statistics.fmean, zip(*own, strict=True))) for rate, own in by_rate.items()
    }
    best = max(means, key=lambda rate: means[rate])
    return best, {r: None if m[0] == -math.inf else m[0] for r, m in means.items()}


def at(member: Member, rate: float, seed: int) -> Member:
    """Returns the same setting with another rate and seed."""
    return dataclasses.replace(member, learning_rate=rate, seed=seed)
