"""Metrics of predictions, against their textbook formulas written out one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.tasks.scores import accuracy, f1, matthews, pearson, spearman


def counts(predictions, labels):
    pairs = list(zip(predictions.tolist(), labels.tolist(), strict=True))
    return [pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1))]  # TP, TN, FP, FN


@pytest.mark.parametrize("seed", range(5))
def test_of_classes_they_are_what_the_four_counts_give(seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(60) < 0.7).astype(np.int32)
    predictions = np.where(rng.random(60) < 0.3, 1 - labels, labels).astype(np.int32)
    tp, tn, fp, fn = counts(predictions, labels)
    assert accuracy(predictions, labels) == pytest.approx((tp + tn) / 60)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert f1(predictions, labels) == pytest.approx(2 / (1 / precision + 1 / recall))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(product)
    assert matthews(predictions, labels) == pytest.approx(expected)


def rank(values, i):
    """One more than the number of lower values, and half of the others that are equal."""
    return 1 + sum(v < values[i] for v in values) + (sum(v == values[i] for v in values) - 1) / 2


@pytest.mark.parametrize("seed", range(5))
def test_of_scores_they_are_the_correlations_of_values_and_of_ranks(seed):
    rng = np.random.default_rng(seed)
    labels = np.round(5 * rng.random(40), 0).astype(np.float32)  # with ties
    predictions = (labels + rng.standard_normal(40)).astype(np.float32)
    expected = np.corrcoef(predictions.astype(float), labels.astype(float))[0, 1]
    assert pearson(predictions, labels) == pytest.approx(expected, abs=1e-12)
    ranks = [[rank(values, i) for i in range(40)] for values in (predictions, labels)]
    assert spearman(predictions, labels) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)
    assert spearman(np.exp(predictions), labels) == pytest.approx(spearman(predictions, labels))


def test_small_differences_of_large_values_count():
    values = np.array([1e4, 1e4 + 0.01, 1e4 + 0.02], np.float32)
    assert pearson(values, np.array([1.0, 2.0, 3.0])) > 0.9


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
def test_a_constant_correlates_with_nothing(metric):
    some, constant = np.array([0, 1, 1]), np.array([1, 1, 1])
    assert metric(constant, some) == metric(some, constant) == metric(constant, constant) == 0
    # The mean of such numbers is not exactly one of them.
    assert pearson(np.full(3, 0.1), np.array([1.0, 2.0, 4.0])) == 0


def test_f1_without_class_1_is_0_and_is_not_symmetric_in_the_classes():
    zeros, labels = np.zeros(4, int), np.array([0, 0, 0, 1])
    assert f1(zeros, labels) == f1(zeros, zeros) == 0
    assert f1(1 - zeros, labels) == 0.4
    assert f1(1 - zeros, 1 - zeros) == 1


@pytest.mark.parametrize("metric", [accuracy, f1, matthews, pearson, spearman])
def test_predictions_of_other_examples_are_refused(metric):
    for predictions in (np.zeros(3), np.zeros((4, 1)), np.zeros(())):
        with pytest.raises(ValueError, match="one prediction for each"):
            metric(predictions, np.zeros(4))
    with pytest.raises(ValueError, match="at least one"):
        metric(np.zeros(0), np.zeros(0))


def test_matthews_is_of_two_classes():
    with pytest.raises(ValueError, match="two classes"):
        matthews(np.array([0, 2]), np.array([0, 1]))
