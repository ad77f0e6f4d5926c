"""The loss, the evaluation and the schedule of a classifier."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.trainer.classification import evaluate, logits_of
from tests.experiments.trainer.fits import SCHEDULE, TASK, adapted


def test_evaluation_is_that_of_all_examples_without_dropout():
    model, _ = adapted()
    model.train()
    few = TASK.validation
    logits = logits_of(model, few)
    np.testing.assert_array_equal(logits, logits_of(model, few))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = evaluate(model, few)
    assert logits.shape == (len(few), 2)
    assert values["loss"] == pytest.approx(-log_p[np.arange(len(few)), few.labels].mean(), rel=1e-5)
    assert values["accuracy"] == pytest.approx((logits.argmax(-1) == few.labels).mean())


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [float(SCHEDULE.over(100)(step)) for step in range(101)]
    assert rates[0] == 0 and rates[100] == pytest.approx(0, abs=1e-9)
    assert max(rates) == rates[10] == pytest.approx(1e-2)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
