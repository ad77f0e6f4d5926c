"""The trainer's overhead is measured on the same steps."""

import math

import pytest

from experiments.benchmarks import trainer_overhead
from experiments.tasks.metrics import read_metrics
from tests.experiments.tiny_models import tiny_mlp


def test_the_time_of_a_step_leaves_the_first_ones_out():
    watched = trainer_overhead._Watched(None, times=[0.0, 5.0, 9.0, 10.0, 11.0, 13.5])
    assert watched.seconds_per_step() == pytest.approx(1.5)


def test_trainer_and_bare_loop_take_the_same_steps(tmp_path, monkeypatch):
    losses = []
    blocked = trainer_overhead.jax.block_until_ready
    monkeypatch.setattr(
        trainer_overhead.jax, "block_until_ready", lambda x: losses.append(x) or blocked(x)
    )
    figures = trainer_overhead.measure(tiny_mlp(), rounds=1, steps=1, folder=tmp_path)
    bare = [float(x[0] if isinstance(x, tuple) else x) for x in losses if x is not None]
    trained = [line["loss"] for line in read_metrics(tmp_path)]
    assert len(trained) == 4 and bare[4:] == pytest.approx(trained, rel=1e-6)
    assert all(math.isfinite(x) and x > 0 for x in (figures["ratio"], *figures["ratio_quartiles"]))
