"""Prompts with answers: token ids, training batches in buckets of length, and the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.trainer.step import WEIGHT

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from tokenizers import Tokenizer

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Lengths to which rows are padded. Every length is one more program to compile."""

# Positions whose logits are in memory at the same time: 50 MB for the 49,152 tokens of SmolLM2.
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its answer.

    Attributes:
        prompt: Not empty.
        answer: Not empty.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], answers: Sequence[str], end_id: int | None = None
) -> list[Encoded]:
    """Encodes prompts and answers apart, so that the prompt's tokens do not depend on the answer.

    Args:
        tokenizer: Its special tokens, such as one at the start of a text, are put before prompts.
        prompts: The texts before the answers.
        answers: The answers. Each starts with the space that is before it.
        end_id: A token id put after each answer; None puts none.
    """
    end = () if end_id is None else (end_id,)
    asked = tokenizer.encode_batch(list(prompts))
    answered = tokenizer.encode_batch(list(answers), add_special_tokens=False)
    return [
        Encoded(tuple(one.ids), (*other.ids, *end))
        for one, other in zip(asked, answered, strict=True)
    ]


def bucket(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """Returns the smallest bucket that holds a length.

    Raises:
        ValueError: None does.

    Example:
        >>> bucket(33)
        48
    """
    for size in buckets:
        if length <= size:
            return size
    raise ValueError(f"a text of {length} tokens is longer than the longest bucket, {buckets[-1]}")


class AnswerBatches(Iterator[Any]):
    """Endless training batches, each of rows of one bucket of length.

    Rows are shuffled anew in every pass. A batch is given when one bucket has enough rows; those
    that are left wait for the next pass, so that no row is left out. The order follows from the
    seed alone.

    Each batch holds, beside `input_ids` and `attention_mask`, `positions`: those whose next token
    is to be predicted; `targets`, these tokens; and `weight`, 0 where a row has no more of them.

    Args:
        rows: What to train on.
        batch_size: Rows of a batch.
        seed: Of the order.
        max_length: The end of a longer row is cut off.
        train_on_prompt: Whether the prompt's tokens are predicted too.
        part: Of each batch, the rows that are read. Each of several processes reads its own.

    Raises:
        ValueError: There are fewer rows than `batch_size`, or a prompt fills `max_length`.

    Example:
        >>> rows = [Encoded((1, 2, 3), (4, 5)), Encoded((6,), (7,))]
        >>> batch = next(AnswerBatches(rows, 2, seed=0, max_length=16))
        >>> batch["input_ids"].shape, sorted(batch["targets"][batch["weight"] > 0].tolist())
        ((2, 16), [4, 5, 7])
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        batch_size: int,
        *,
        seed: int,
        max_length: int,
        train_on_prompt: bool = False,
        part: slice = slice(None),
    ) -> None:
        if len(rows) < batch_size:
            raise ValueError(f"{len(rows)} rows do not fill a batch of {batch_size}")
        for number, row in enumerate(rows):
            if len(row.prompt) >= max_length:
                raise ValueError(
                    f"the prompt of row {number} has {len(row.prompt)} tokens: nothing of its "
                    f"answer is left within {max_length}"
                )
        self._rows, self._size, self._part = rows, batch_size, part
        self._on_prompt, self._seed = train_on_prompt, seed
        self._lengths = [min(bucket(min(len(row), max_length)), max_length) for row in rows]
        self._max_length = max_length
        # One number of predicted tokens for all rows of a bucket, so that it has one program.
        self._predicted: dict[int, int] = {}
        for row, length in zip(rows, self._lengths, strict=True):
            count = len(self._targets(row))
            self._predicted[length] = max(self._predicted.get(length, 1), -(-count // 4) * 4)
        self._restart()

    def _targets(self, row: Encoded) -> range:
        """The positions of a row that are predicted: the first tokens of a text are not."""
        first = 1 if self._on_prompt else len(row.prompt)
        return range(first, min(len(row), self._max_length))

    @property
    def shapes(self) -> dict[int, int]:
        """The length of each kind of batch, and how many rows have it."""
        lengths, counts = np.unique(self._lengths, return_counts=True)
        return dict(zip(lengths.tolist(), counts.tolist(), strict=True))

    def _restart(self) -> None:
        self._given, self._pass = 0, 0
        self._waiting: dict[int, list[int]] = {}
        self._order: list[int] = []

    def _next_rows(self) -> list[int]:
        while True:
            if not self._order:
                rng = np.random.default_rng((self._seed, self._pass))
                self._order = rng.permutation(len(self._rows)).tolist()
                self._pass += 1
            row = self._order.pop()
            waiting = self._waiting.setdefault(self._lengths[row], [])
            waiting.append(row)
            if len(waiting) == self._size:
                del self._waiting[self._lengths[row]]
                self._given += 1
                return waiting

    def __next__(self) -> dict[str, np.ndarray]:
        chosen = self._next_rows()
        length = self._lengths[chosen[0]]
        chosen = chosen[self._part]
        count, predicted = len(chosen), self._predicted[length]
        batch = {
            "input_ids": np.zeros((count, length), np.int32),
            "attention_mask": np.zeros((count, length), np.int32),
            "positions": np.zeros((count, predicted), np.int32),
            "targets": np.zeros((count, predicted), np.int32),
            "weight": np.zeros((count, predicted), np.float32),
        }
        for i, row in enumerate(self._rows[r] for r in chosen):
            ids = (*row.prompt, *row.answer)[:length]
            where = self._targets(row)
            batch["input_ids"][i, : len(ids)] = ids
            batch["attention_mask"][i, : len(ids)] = 1
            batch["positions"][i, : len(where)] = np.array(where) - 1
            batch["targets"][i, : len(where)] = [ids[position] for position in where]
            batch["weight"][i, : len(where)] = 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the position: how many batches were given."""
        return {"next_index": self._given}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position, as if the batches before it had been given."""
        self._restart()
        while self._given < state["next_index"]:
            self._next_rows()


def answer_loss(model: Any, batch: Any) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean loss of the predicted tokens of a batch, in nats.

    The output projection is computed at these positions alone.
    """
    hidden = model.hidden_states(batch["input_ids"], batch["attention_mask"])
    at = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)
    losses = token_losses(model, at, batch["targets"])
    weight = batch["weight"]
    total = jnp.sum(weight)
    return jnp.sum(weight * losses) / jnp.maximum(total, 1), {WEIGHT: total}


def token_losses(
    model: Any, hidden: Float[Array, "batch seq hidden"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Returns -log p of each target, in float32, from the inputs of the output projection.

    Logits are computed for `CHUNK` positions at a time, and again in the backward pass: those of
    all positions would be the largest arrays of a step.
    """
    count = targets.size
    chunks = -(-count // CHUNK)
    size = -(-count // chunks)

    def cut(x: Array, *last: int) -> Array:
        x = jnp.reshape(x, (count, *last))
        x = jnp.pad(x, [(0, chunks * size - count), *((0, 0) for _ in last)])
        return jnp.reshape(x, (chunks, 1, size, *last))

    @jax.checkpoint
    def one(part: tuple[Array, Array]) -> Array:
        logits = model.logits(part[0]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, part[1])

    losses = jax.lax.map(one, (cut(hidden, hidden.shape[-1]), cut(jnp.asarray(targets))))
    return jnp.reshape(losses, -1)[:count].reshape(targets.shape)
