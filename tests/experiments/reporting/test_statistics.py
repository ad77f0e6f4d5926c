"""Intervals against their formulas, and against how often they hold the truth."""

import numpy as np
import pytest

from experiments.reporting.statistics import (
    bootstrap_difference,
    correlation,
    mean_interval,
    paired_interval,
)


def test_the_interval_of_a_mean_is_students():
    """For five values, t at 0.975 with 4 degrees of freedom is 2.7764 (published tables)."""
    x = np.array([84.0, 86.0, 85.0, 87.0, 83.5])
    half = 2.7764 * np.sqrt(np.sum((x - x.mean()) ** 2) / 4 / 5)
    np.testing.assert_allclose(
        mean_interval(x.tolist()), (x.mean(), x.mean() - half, x.mean() + half), rtol=1e-5
    )
    shifted = (x - 1).tolist()
    np.testing.assert_allclose(paired_interval(x.tolist(), shifted), (1, 1, 1))
    assert not mean_interval([1.0]).known and mean_interval([1.0]).sign == 0


def test_the_correlation_is_numpys_and_its_interval_holds_the_truth():
    """Clusters share an offset in both; 95 % of intervals should hold 0.6. Points alone do not."""
    rng = np.random.default_rng(0)
    held = {"clustered": 0, "as if independent": 0}
    trials = 60
    for trial in range(trials):
        shared = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 25)
        x, y = np.repeat(shared, 8, axis=0).T + 0.01 * rng.normal(size=(2, 200))
        clusters = np.repeat(np.arange(25), 8).tolist()
        for name, of in (("clustered", clusters), ("as if independent", list(range(200)))):
            found = correlation(x, y, of, resamples=300, seed=trial)
            assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
            held[name] += found.low < 0.6 < found.high
    assert held["clustered"] >= 0.85 * trials
    assert held["as if independent"] < 0.7 * trials


def test_a_correlation_without_spread_or_without_clusters_is_not_known():
    flat, rising = np.zeros(6), np.arange(6.0)
    assert np.isnan(correlation(flat, rising, list(range(6))).value)
    one_cluster = correlation(rising, rising, ["a"] * 6)
    assert one_cluster.value == pytest.approx(1) and not one_cluster.known


def test_far_from_zero_the_sums_do_not_cancel():
    x = 1e6 + np.arange(5.0)
    assert correlation(x, -x, list(range(5))).value == pytest.approx(-1)


def test_the_bootstrap_over_examples_is_paired():
    """Two methods that differ on one example of 400: the interval is about one example wide."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    one = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    other = one.copy()
    other[one.argmax()] = 1 - one[one.argmax()]

    def accuracy(predictions, labels):
        return float(np.mean(predictions == labels))

    found = bootstrap_difference(accuracy, labels, [one], [other])
    assert found.value == pytest.approx(accuracy(one, labels) - accuracy(other, labels))
    assert abs(found.low) <= 5 / 400 and abs(found.high) <= 5 / 400
    both = bootstrap_difference(accuracy, labels, [one, labels], [other])  # two seeds against one
    mean = (accuracy(one, labels) + 1) / 2
    assert both.value == pytest.approx(mean - accuracy(other, labels))
    with pytest.raises(ValueError, match="same examples"):
        bootstrap_difference(accuracy, labels, [one[:-1]], [other])
