"""Metrics of predictions: accuracy, F1, and the correlations of Matthews, Pearson and Spearman.

All are computed in float64 with NumPy. A correlation with a constant is not defined; here it is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Labels = Int[np.ndarray, " example"]
    Values = Float[np.ndarray, " example"]


def accuracy(predictions: Labels, labels: Labels) -> float:
    """Returns the share of predictions that are right."""
    _check(predictions, labels)
    return float(np.mean(predictions == labels))


def f1(predictions: Labels, labels: Labels) -> float:
    """Returns the harmonic mean of precision and recall of class 1.

    It is 0 if class 1 neither occurs nor is predicted.

    Example:
        >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
        0.5
    """
    _check(predictions, labels)
    both = np.sum((predictions == 1) & (labels == 1))
    either = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * both / either) if either else 0.0


def matthews(predictions: Labels, labels: Labels) -> float:
    """Returns Matthews' correlation of two classes: Pearson's correlation of the labels 0 and 1.

    Source: Matthews, Biochimica et Biophysica Acta 405 (1975), 442-451.

    Example:
        >>> matthews(np.array([1, 1, 0, 0]), np.array([1, 1, 0, 1]))
        0.5773502691896258
    """
    _check(predictions, labels)
    if not {*np.unique(predictions), *np.unique(labels)} <= {0, 1}:
        raise ValueError("Matthews' correlation is here of two classes, 0 and 1")
    return pearson(predictions, labels)


def pearson(predictions: Values | Labels, labels: Values | Labels) -> float:
    """Returns Pearson's correlation; 0 if one of the two is constant."""
    _check(predictions, labels)
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (predictions, labels))
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0 or scale == 0:
        return 0.0
    return float(np.clip(np.sum(x * y) / scale, -1, 1))


def spearman(predictions: Values, labels: Values) -> float:
    """Returns Spearman's rank correlation. Equal values share the mean of their ranks.

    Example:
        >>> spearman(np.array([0.1, 0.2, 0.9]), np.array([1.0, 2.0, 3.0]))
        1.0
    """
    _check(predictions, labels)
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(values: Values) -> Values:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def _check(predictions: np.ndarray, labels: np.ndarray) -> None:
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(
            f"need one prediction for each of at least one label, got shapes {predictions.shape} "
            f"and {labels.shape}"
        )
