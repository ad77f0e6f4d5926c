"""Batches of texts of similar length, so that short texts do not pay for the longest one.

Each text belongs to the shortest bucket that holds it, and a batch is padded to its bucket's
length. Every length is one compiled program, so that there are few. Which bucket comes at which
step depends on the epoch alone, and which texts fill it on the seed: batches of several seeds can
be stacked at each step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int

    Lengths = Int[np.ndarray, " text"]


def bucket_lengths(lengths: Lengths, count: int = 3, *, multiple: int = 8) -> tuple[int, ...]:
    """Returns the lengths of buckets, ascending, that need the fewest tokens, padding included.

    Args:
        lengths: Tokens of each text.
        count: Buckets at most.
        multiple: The lengths are multiples of it.

    Example:
        >>> bucket_lengths(np.array([3, 5, 7, 8, 30, 60, 61]), 2)
        (8, 64)
    """
    needed = -(-np.maximum(lengths, 1) // multiple)
    sizes = np.unique(needed)
    texts = np.cumsum(np.bincount(needed))
    best = (int(sizes[-1]),)
    fewest = int(texts[-1]) * best[0]
    for chosen in itertools.combinations(sizes[:-1].tolist(), min(count, len(sizes)) - 1):
        ends = (*chosen, int(sizes[-1]))
        tokens = sum(
            end * int(texts[end] - (texts[start] if start else 0))
            for start, end in itertools.pairwise((0, *ends))
        )
        if tokens < fewest:
            best, fewest = ends, tokens
    return tuple(multiple * size for size in best)


@dataclass(frozen=True)
class Batches:
    """Says which texts make the batches of each step.

    Attributes:
        lengths: Tokens of each text.
        buckets: The lengths of the buckets, ascending; the last one holds every text.
        batch_size: Texts of a batch.

    Example:
        >>> batches = Batches(np.array([3, 9, 4, 10, 2]), (4, 10), 2)
        >>> batches.per_epoch, batches.steps(epoch=0)
        (2, (4, 10))
        >>> [sorted(index.tolist()) for index, _ in batches.epoch(0, seed=0)]
        [[2, 4], [0, 3]]
    """

    lengths: Lengths
    buckets: Sequence[int]
    batch_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.lengths):
            raise ValueError(
                f"{len(self.lengths)} texts do not fill a batch of {self.batch_size}: choose a "
                "smaller batch_size"
            )

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch. The texts that do not fill a batch are left out, others each time."""
        return len(self.lengths) // self.batch_size

    def steps(self, epoch: int) -> tuple[int, ...]:
        """Returns the length of the batch at each step of an epoch, whatever the seed."""
        ascending = self._ascending()
        order = np.random.default_rng(epoch).permutation(self.per_epoch)
        return tuple(ascending[i] for i in order)

    def epoch(self, epoch: int, *, seed: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields the indices of the texts of each step, and the length of the bucket."""
        shuffled = np.random.default_rng((seed, epoch)).permutation(len(self.lengths))
        own = np.searchsorted(self.buckets, self.lengths[shuffled])
        # Those that are left in a bucket go on to the next one, so that an epoch is a full pass.
        filled: dict[int, list[np.ndarray]] = {}
        rest = shuffled[:0]
        for number, length in enumerate(self.buckets):
            texts = np.concatenate([rest, shuffled[own == number]])
            whole = len(texts) // self.batch_size * self.batch_size
            filled[length] = list(texts[:whole].reshape(-1, self.batch_size))
            rest = texts[whole:]
        for length in self.steps(epoch):
            yield filled[length].pop(), length

    def _ascending(self) -> list[int]:
        own = np.searchsorted(self.buckets, self.lengths)
        found: list[int] = []
        for number, length in enumerate(self.buckets):
            until = int(np.sum(own <= number)) // self.batch_size
            found += [length] * (until - len(found))
        return found


def in_order(
    lengths: Lengths, buckets: Sequence[int], batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the indices of every text once, bucket by bucket, and the bucket's length.

    The last batch of a bucket may be smaller than `batch_size`.
    """
    own = np.searchsorted(buckets, lengths)
    for number, length in enumerate(buckets):
        texts = np.flatnonzero(own == number)
        for start in range(0, len(texts), batch_size):
            yield texts[start : start + batch_size], length
