"""Training batches of answers, and the loss on their tokens."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.language import answers
from experiments.language.answers import AnswerBatches, Encoded, answer_loss
from experiments.models.llama import Llama
from tests.experiments.tiny_models import LLAMA, filled


def rows_of(count: int, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, 40, rng.integers(1, most)).tolist())

    return [Encoded(tokens(30), tokens(12)) for _ in range(count)]


ROWS = rows_of(11)


def batches(rows=ROWS, size=4, **options):
    return AnswerBatches(rows, size, **{"seed": 3, "max_length": 64, **options})


def texts(batch):
    """The rows of a batch, and which of their tokens are predicted."""
    for ids, mask, at, targets, weight in zip(*batch.values(), strict=True):
        text = ids[: mask.sum()].tolist()
        assert not ids[mask.sum() :].any()
        where = at[weight > 0]
        assert [text[i + 1] for i in where] == targets[weight > 0].tolist()
        yield text, where.tolist()


def test_every_pass_has_every_row_and_predicts_its_answer():
    stream = batches()
    # The rows that wait are of at most three in each bucket.
    passes, waiting = 8, 3 * len(stream.shapes)
    seen = {tuple((*row.prompt, *row.answer)): 0 for row in ROWS}
    lengths = {tuple((*row.prompt, *row.answer)): len(row.prompt) for row in ROWS}
    taken = (len(ROWS) * passes - waiting) // 4
    for _ in range(taken):
        for text, where in texts(next(stream)):
            seen[tuple(text)] += 1
            assert where == list(range(lengths[tuple(text)] - 1, len(text) - 1))
    assert all(passes - waiting <= count <= passes for count in seen.values())
    assert sum(seen.values()) == 4 * taken


def test_the_prompt_is_predicted_too_and_the_end_is_cut_off():
    stream = batches(max_length=31, train_on_prompt=True)
    whole = [[*row.prompt, *row.answer][:31] for row in ROWS]
    for _ in range(6):
        for text, where in texts(next(stream)):
            assert text in whole and where == list(range(len(text) - 1))


def test_a_position_that_is_set_continues_the_stream():
    one, other = batches(), batches()
    for _ in range(7):
        next(one)
    for _ in range(3):
        next(other)
    other.set_state(one.get_state())
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, next(one), next(other))
    assert not np.array_equal(next(batches(seed=4))["targets"], next(batches())["targets"])


def test_processes_read_parts_of_the_same_batches():
    whole, parts = batches(), [batches(part=part) for part in (slice(0, 2), slice(2, 4))]
    for _ in range(3):
        read = [next(part) for part in parts]
        joined = {name: np.concatenate([part[name] for part in read]) for name in read[0]}
        jax.tree.map(np.testing.assert_array_equal, joined, next(whole))


def test_rows_that_cannot_be_trained_on_are_named():
    with pytest.raises(ValueError, match="3 rows do not fill a batch of 4"):
        batches(ROWS[:3])
    with pytest.raises(ValueError, match="prompt of row 1 has 9 tokens"):
        batches([Encoded((1,), (2,)), Encoded((1,) * 9, (2,))], 1, max_length=9)


@functools.cache
def model():
    return filled(lambda: Llama(LLAMA, scan_layers=True, rngs=nnx.Rngs(0)))


@pytest.mark.rows(1)
@pytest.mark.parametrize("chunk", [5, 256])
def test_the_loss_and_its_gradient_are_those_of_all_logits(monkeypatch, chunk):
    monkeypatch.setattr(answers, "CHUNK", chunk)  # 5 leaves a part of a chunk
    batch = next(batches())

    def plain(model, batch):
        log_p = jax.nn.log_softmax(model(batch["input_ids"], batch["attention_mask"]))
        rows = np.arange(4)[:, None]
        p = log_p[rows, batch["positions"], batch["targets"]]
        return -(p * batch["weight"]).sum() / batch["weight"].sum()

    def own(model, batch):
        return answer_loss(model, batch)[0]

    found, expected = (nnx.jit(nnx.value_and_grad(f))(model(), batch) for f in (own, plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )
