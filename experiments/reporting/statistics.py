"""Means, differences and correlations, with 95 % intervals that say what they are over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import special  # type: ignore[import-untyped]  # of JAX's own dependencies

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

LEVEL = 0.95
RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with a 95 % interval, whose ends are NaN where it cannot be known."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval: one seed alone has none."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sign(self) -> int:
        """-1 or 1 if the interval excludes 0, otherwise 0."""
        return int(self.low > 0) - int(self.high < 0) if self.known else 0

    def scaled(self, factor: float) -> Interval:
        """Returns the interval in another unit; the factor is positive."""
        return Interval(*(factor * x for x in self))


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds with Student's t interval.

    Example:
        >>> "{:.2f} ({:.2f} to {:.2f})".format(*mean_interval([1.0, 2.0, 3.0]))
        '2.00 (-0.48 to 4.48)'
        >>> mean_interval([1.0]).known
        False
    """
    x = np.asarray(values, np.float64)
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2:
        return Interval(mean, math.nan, math.nan)
    quantile = float(special.stdtrit(len(x) - 1, 0.5 + LEVEL / 2))
    half = quantile * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def paired_interval(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Returns the mean of `one - other` over seeds that both have, in the same order.

    Pairing removes what a seed has in common: the order of the data, the start of the head.
    """
    return mean_interval(np.subtract(one, other).tolist())


def correlation(
    x: Float[np.ndarray, " point"],
    y: Float[np.ndarray, " point"],
    clusters: Sequence[object],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns Pearson's correlation with a percentile interval of the cluster bootstrap.

    Points of one cluster are not independent: a layer's at all checkpoints and in all seeds lie on
    one path. So whole clusters are drawn, with replacement. The interval says how the correlation
    would vary with other layers; with few clusters it is too narrow.
    Source: Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007).

    Args:
        x, y: The points.
        clusters: The cluster of each point, such as its layer.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        NaN where there is no spread; an interval of NaN with fewer than three clusters.
    """
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return Interval(math.nan, math.nan, math.nan)
    x, y = ((v - v.mean()) / v.std() for v in (x, y))  # so that the sums do not cancel
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    of_point = np.array([names[name] for name in clusters])
    columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)
    sums = np.zeros((len(names), 6))
    np.add.at(sums, of_point, columns)
    value = float(_pearson(sums.sum(0)))
    if len(names) < 3:
        return Interval(value, math.nan, math.nan)
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), resamples
    )
    drawn = _pearson(draws @ sums)
    ends = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(ends[0]), float(ends[1]))


def bootstrap_difference(
    metric: Callable[[Shaped[np.ndarray, " example"], Shaped[np.ndarray, " example"]], float],
    labels: Shaped[np.ndarray, " example"],
    one: Sequence[Shaped[np.ndarray, " example"]],
    other: Sequence[Shaped[np.ndarray, " example"]],
    *,
    resamples: int = 500,
) -> Interval:
    """Returns the difference of a test metric between two methods, over the choice of examples.

    Both methods see the same drawn examples; the metric is averaged over their seeds. This is for
    metrics that are no mean over examples, such as F1 and Matthews' correlation, too.

    Args:
        metric: `metric(predictions, labels)`.
        labels: Of the test examples.
        one, other: Predictions of each method, one array a seed.
        resamples: Number of draws.

    Raises:
        ValueError: Predictions and labels are not of equal length.
    """
    if any(len(p) != len(labels) for p in (*one, *other)):
        raise ValueError("predictions and labels must be of the same examples")

    def difference(rows: Shaped[np.ndarray, " example"] | slice) -> float:
        means = [np.mean([metric(p[rows], labels[rows]) for p in ps]) for ps in (one, other)]
        return float(means[0] - means[1])

    rng = np.random.default_rng(0)
    drawn = [difference(rng.integers(0, len(labels), len(labels))) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(difference(slice(None)), float(low), float(high))


def _pearson(sums: Float[np.ndarray, "*draw 6"]) -> Float[np.ndarray, " *draw"]:
    """Returns the correlation from the sums of 1, x, y, xx, yy and xy; NaN without spread."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums), -1, 0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (n * xy - x * y) / np.sqrt(spread), np.nan)
