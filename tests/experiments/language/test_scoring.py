"""Likelihoods of options with a shared prompt equal those of whole texts."""

from __future__ import annotations

import functools

import numpy as np
from flax import nnx

from experiments.language.scoring import Options, Scores, _batches, score
from experiments.models.llama import Llama
from tests.experiments.tiny_models import LLAMA, filled


@functools.cache
def model():
    return filled(lambda: Llama(LLAMA, scan_layers=True, rngs=nnx.Rngs(0)))


whole = nnx.jit(lambda model, tokens: model(tokens))


def questions(count: int) -> list[Options]:
    rng = np.random.default_rng(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, 40, rng.integers(1, most)).tolist())

    return [
        Options(tokens(30), tuple(tokens(8) for _ in range(rng.choice([3, 4, 5]))), label=i % 3)
        for i in range(count)
    ]


def test_scores_are_the_sums_over_each_option_of_a_call_on_prompt_and_option():
    asked, done = questions(20), []
    scores = score(model(), asked, done.append)
    assert sum(done) == len(asked)
    for number in (0, 7, 19):
        question = asked[number]
        for i, option in enumerate(question.options):
            text = [*question.prompt, *option]
            logits = np.asarray(whole(model(), np.array([text + [0] * (40 - len(text))])), float)
            log_p = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
            start = len(question.prompt) - 1
            expected = sum(log_p[start + j, token] for j, token in enumerate(option))
            np.testing.assert_allclose(scores.sums[number, i], expected, rtol=1e-5)
            assert scores.lengths[number, i] == len(option)
        assert not np.isfinite(scores.sums[number, len(question.options) :]).any()
    assert scores.labels.tolist() == [question.label for question in asked]


def test_accuracies_are_by_token_and_by_the_sum_and_the_loss_is_of_right_options():
    sums = np.array([[-4.0, -3.0, -np.inf], [-6.0, -8.0, -1.0]])
    lengths = np.array([[4, 1, 0], [2, 8, 1]])
    assert Scores(sums, lengths, np.array([0, 1])).metrics() == {
        "accuracy": 1.0,  # -1 against -3; -3, -1 and -1, of which the first is taken
        "accuracy_sum": 0.0,
        "loss": 12 / 12,
    }


def test_batches_hold_every_option_once_and_few_tokens():
    rng = np.random.default_rng(1)
    asked = [
        Options((1,) * rng.integers(1, 100), ((2,) * rng.integers(1, 400),) * count, 0)
        for count in (1, 2, 3, 4, 5, 9)
        for _ in range(7)
    ]
    places = []
    for ((ids, _), of_prompt, (options, real)), rows in _batches(asked):
        assert len(options) * options.shape[1] <= max(1024, 16 * 512)
        for row, (number, option) in enumerate(rows):
            length = len(asked[number].options[option])
            assert real[row].sum() == length
            assert ids[of_prompt[row]].sum() == len(asked[number].prompt)
        places += rows
    assert sorted(places) == [
        (n, i) for n, one in enumerate(asked) for i in range(len(one.options))
    ]
