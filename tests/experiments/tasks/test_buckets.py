"""Buckets: every text fits its batch, an epoch is a pass, and all seeds have the same lengths."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from experiments.tasks.buckets import Batches, bucket_lengths, in_order


def lengths(count=101, seed=0):
    return np.random.default_rng(seed).geometric(0.06, count).clip(max=63)


def padded(lengths, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_other_lengths_need_fewer_tokens(count):
    texts = lengths()
    found = bucket_lengths(texts, count, multiple=8)
    assert len(found) <= count
    assert all(b % 8 == 0 for b in found)
    last = -(-max(texts) // 8) * 8
    others = itertools.combinations(range(8, last, 8), count - 1)
    best = min(padded(texts, (*other, last)) for other in others)
    assert padded(texts, found) == best


def test_equal_lengths_are_one_bucket():
    assert bucket_lengths(np.full(9, 16), 3) == (16,)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 101])
def test_an_epoch_has_each_text_at_most_once_in_a_batch_that_holds_it(batch_size):
    texts = lengths()
    batches = Batches(texts, (8, 24, 64), batch_size)
    taken = list(batches.epoch(3, seed=5))
    assert len(taken) == batches.per_epoch == 101 // batch_size
    assert all(len(index) == batch_size for index, _ in taken)
    assert all(texts[index].max() <= length for index, length in taken)
    seen = Counter(i for index, _ in taken for i in index.tolist())
    assert max(seen.values()) == 1


def test_seeds_differ_in_texts_and_not_in_lengths_and_epochs_differ_in_both():
    batches = Batches(lengths(), (8, 24, 64), 7)

    def of(epoch, seed):
        taken = list(batches.epoch(epoch, seed=seed))
        return [i.tolist() for i, _ in taken], tuple(length for _, length in taken)

    (one, steps), (again, _), (other, same) = of(0, 1), of(0, 1), of(0, 2)
    assert one == again != other
    assert steps == same == batches.steps(0)
    later, later_steps = of(1, 1)
    assert later != one
    assert later_steps != steps
    assert sorted(later_steps) == sorted(steps)


def test_few_texts_of_a_bucket_go_into_the_next_one():
    texts = np.array([4] * 3 + [9] * 3)
    taken = list(Batches(texts, (4, 9), 2).epoch(0, seed=0))
    assert sorted(length for _, length in taken) == [4, 9, 9]
    assert sorted(i for index, _ in taken for i in index) == list(range(6))


def test_in_order_has_every_text_once():
    texts = lengths()
    taken = list(in_order(texts, (8, 24, 64), 10))
    assert sorted(i for index, _ in taken for i in index) == list(range(101))
    assert all(texts[index].max() <= length and len(index) <= 10 for index, length in taken)
    tokens = sum(length * len(index) for index, length in taken)
    assert tokens == padded(texts, (8, 24, 64))


def test_too_few_texts_are_named():
    with pytest.raises(ValueError, match="3 texts do not fill a batch of 4"):
        Batches(np.ones(3, int), (8,), 4)
