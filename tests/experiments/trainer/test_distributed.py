"""How the processes of a run find each other, and what they say at the end."""

from __future__ import annotations

import jax
import pytest

from experiments.trainer import distributed
from experiments.trainer.signals import InterruptedStepError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_stays_as_it_is():
    with distributed.start("Go on.", detect=False):
        assert jax.process_count() == 1
    with pytest.raises(KeyError), distributed.start("Go on.", detect=False):
        raise KeyError


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        (("127.0.0.1:1", "", "0"), "JAX_NUM_PROCESSES"),
        (("", "2", "0"), "JAX_COORDINATOR_ADDRESS"),
        (("127.0.0.1:1", "2", "one"), "JAX_PROCESS_ID"),
    ],
)
def test_variables_that_are_not_all_there_are_named(monkeypatch, values, missing):
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{missing} is"), distributed.start("Go on."):
        raise AssertionError("it started")


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (SystemExit("No room."), 1, "No room."),
        (SystemExit(143), 143, ""),
        (SystemExit(), 0, ""),
        (KeyboardInterrupt(), 130, "Process 0 of 1: interrupted. Go on."),
        (InterruptedStepError(15, 7), 143, "terminated at step 7, which is saved. Go on."),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed"), 1, "lost another one"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1, "out of memory"),
        (ValueError("UNKNOWN: Gloo AllGather failed"), 1, "lost another one"),
        (ValueError("no connection"), 1, "ValueError: no connection"),
    ],
)
def test_a_process_says_why_it_ends(capsys, error, status, text):
    assert distributed._say(error, "Go on.") == status
    said = capsys.readouterr().err
    assert text in said and bool(said) == bool(text)
