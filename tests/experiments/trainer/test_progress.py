"""The speed in the progress line, from numbers that are known."""

from __future__ import annotations

import dataclasses
import time

import jax
import pytest
from flax import nnx

import dora_jax as dora
from experiments.models.llama import Llama
from experiments.trainer import flops
from experiments.trainer.progress import Progress, Speed
from tests.experiments.tiny_models import LLAMA


def test_tokens_per_second_and_utilisation_are_those_of_the_recent_steps():
    speed = Speed(tokens=100, flops_per_token=2_000, peak=1e6)
    assert speed.figures() == {}
    speed.add(10.0)
    for _ in range(20):
        speed.add(0.5)
    assert speed.tokens_per_second == pytest.approx(200)
    assert speed.utilisation == pytest.approx(0.4)
    assert speed.figures() == {"tokens/s": "200", "MFU": "40.0 %"}


def test_what_is_not_known_is_not_shown():
    speed = Speed(tokens=100, flops_per_token=2_000, peak=flops.peak_flops())
    speed.add(0.5)
    assert jax.devices()[0].device_kind not in flops.PEAK_FLOPS  # a CPU
    assert speed.figures() == {"tokens/s": "200"}
    unknown = Speed(tokens=0)
    unknown.add(0.5)
    assert unknown.figures() == {}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_a_token_costs_4_flops_a_frozen_weight_and_6_a_trained_one(tied, scan):
    config = dataclasses.replace(LLAMA, tie_word_embeddings=tied)
    rank, hidden, inner, keys = 2, config.hidden_size, config.intermediate_size, 8
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = config.num_hidden_layers * sum(a * b for a, b in shapes) + 40 * hidden
    factors = config.num_hidden_layers * sum(rank * (a + b) for a, b in shapes)

    def adapt():
        model = Llama(config, scan_layers=scan, rngs=nnx.Rngs(0))
        wanted = dora.DoRAConfig(rank=rank, target_modules=r"layers\..*_proj")
        return dora.apply_dora(model, wanted, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(adapt)
    assert flops.flops_per_token(model, dora.DoRAParam) == 4 * weights + 6 * factors


def test_the_line_says_what_runs_how_far_how_fast_and_that_it_compiles(capsys):
    with Progress("tuning", steps=3) as progress:
        with progress.compiling():
            time.sleep(0.01)
        speed = Speed(tokens=100)
        for _ in range(3):
            speed.add(0.5)
            progress.step({"loss": 1.25}, speed)
        progress.say("a line")
    out, err = capsys.readouterr()
    assert out == "a line\n"
    assert "tuning: compiling ... 0 s" in err
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("tuning: 100%") and "3/3" in last
    assert "loss=1.25" in last and "tokens/s=200" in last


def test_only_one_process_shows_it(capsys):
    with Progress("tuning", steps=1, shown=False) as progress, progress.compiling():
        progress.step({"loss": 1.0}, Speed(0))
        progress.say("a line")
    assert capsys.readouterr() == ("", "")
