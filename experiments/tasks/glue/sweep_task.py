"""A GLUE task for sweeps: a pretrained encoder with a new head, and batches by length."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.models.bert_classifier import BertClassifier, Pooling
from experiments.models.bert_config import BertConfig
from experiments.models.huggingface import load_bert
from experiments.sweeps.task import Batch, Scores, Split
from experiments.tasks.buckets import Batches, bucket_lengths, in_order
from experiments.tasks.glue.reading import Rows
from experiments.tasks.glue.splits import GlueSplits
from experiments.tasks.glue.tables import GlueTask
from experiments.tasks.sarcasm import DatasetError
from experiments.tasks.text import tokenize
from experiments.trainer.methods import HEAD

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

# Rows per batch where no gradient is needed: small, as each bucket's last batch is filled up.
EVAL_ROWS = 64


class Encoded(NamedTuple):
    """Tokenised rows of one split, padded to the longest, each array `(row, token)`, and labels."""

    arrays: dict[str, np.ndarray]
    lengths: np.ndarray
    labels: np.ndarray

    def batch(self, index: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Returns the arrays of some rows, cut to a length that holds them, and their labels."""
        arrays = {name: values[index, :length] for name, values in self.arrays.items()}
        return arrays | {"label": self.labels[index]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """The pretrained encoder, and how it is used.

    Attributes:
        folder: A BERT or RoBERTa checkpoint folder in Hugging Face's format.
        name: The name of the model in results.
        max_length: Tokens of a row at most; the end of a longer one is cut off.
        pooling: What the head reads: the mean over the tokens, or the first token.
        dropout: Dropout rate of the encoder and of the head's input. None is the checkpoint's own.
        buckets: Number of lengths of batches at most.
        dtype: Dtype of the products.
    """

    folder: Path
    name: str
    max_length: int = 128
    pooling: Pooling = "mean"
    dropout: float | None = 0.0
    buckets: int = 2
    dtype: DTypeLike = jnp.float32


class GlueSweepTask:
    """A `SweepTask` of one GLUE task.

    A score is predicted in standard deviations of the training scores, from their mean: the loss
    is the mean squared error in these units.

    Args:
        task: The task.
        splits: Its rows.
        encoder: The encoder.

    Attributes:
        truncated: Rows of all splits that were longer than `max_length`.
        buckets: The lengths of the batches.

    Raises:
        DatasetError: The tokenizer is of another model than the weights.
    """

    def __init__(self, task: GlueTask, splits: GlueSplits, encoder: EncoderSettings) -> None:
        self.task, self.encoder = task, encoder
        self._config = BertConfig.from_json(encoder.folder / "config.json")
        self.truncated = 0
        self._train = self._encode(splits.train)
        validation, test = self._encode(splits.validation), self._encode(splits.test)
        self._parts: dict[Split, list[Encoded]] = {"validation": [validation], "test": [test]}
        if splits.mismatched is not None:
            self._parts["test"].append(self._encode(splits.mismatched))
        self.buckets = bucket_lengths(self._train.lengths, encoder.buckets)
        parts = itertools.chain.from_iterable(self._parts.values())
        longest = max(int(part.lengths.max()) for part in parts)
        # One more for rows of another split that are longer than all.
        longer = () if longest <= self.buckets[-1] else (encoder.max_length,)
        self._buckets = (*self.buckets, *longer)
        self._centre, self._spread = 0.0, 1.0
        if not task.labels:
            self._centre = float(np.mean(splits.train.labels))
            self._spread = float(np.std(splits.train.labels)) or 1.0

    # What a sweep asks for.

    @property
    def name(self) -> str:
        """The key of the task."""
        return self.task.key

    @property
    def base(self) -> str:
        """The name of the encoder."""
        return self.encoder.name

    @property
    def metric(self) -> str:
        """The published metric that chooses."""
        return self.task.metric

    @property
    def max_length(self) -> int:
        """Tokens of a row at most."""
        return self.encoder.max_length

    @property
    def train_examples(self) -> int:
        """Number of rows to train on."""
        return len(self._train.labels)

    @property
    def fields(self) -> Mapping[str, Any]:
        """All linear layers are adapted, and the head is trained in full."""
        return {"modules_to_save": (HEAD,)}

    def model(self, seed: int) -> nnx.Module:
        """Returns the encoder with a new head, drawn with the seed. Parameters are float32."""
        rngs, settings = nnx.Rngs(seed), self.encoder
        encoder = load_bert(
            settings.folder, dtype=settings.dtype, dropout_rate=settings.dropout, rngs=rngs
        )
        return BertClassifier(encoder, self.task.outputs, pooling=settings.pooling, rngs=rngs)

    def example_call(self) -> tuple[Any, ...]:
        """Returns the arguments of a call on the first row."""
        return _inputs(self._train.batch(np.zeros(1, np.int64), self.buckets[-1]))

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Returns shuffled batches without end, at each step of one length for all seeds."""
        planned = Batches(self._train.lengths, self._buckets, batch_size)
        for epoch in itertools.count():
            for index, length in planned.epoch(epoch, seed=seed):
                yield self._train.batch(index, length)

    def loss(
        self, model: nnx.Module, batch: Any
    ) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
        """Returns the mean cross-entropy (nats), or the mean squared error of a score."""
        outputs = self.predict(model, batch)
        if not self.task.labels:
            wanted = (batch["label"] - self._centre) / self._spread
            return jnp.mean(jnp.square(outputs[:, 0] - wanted)), {}
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
        return jnp.mean(losses), {"accuracy": jnp.mean(outputs.argmax(-1) == batch["label"])}

    def predict(self, model: nnx.Module, batch: Any) -> Float[Array, "row output"]:
        """Returns the outputs of the head, in float32."""
        called: Any = model
        return called(*_inputs(batch)).astype(jnp.float32)

    def eval_batches(self, split: Split) -> Sequence[Batch]:
        """Returns every row once, by length; batches are filled up with copies of their first."""
        return [part.batch(_filled(index), length) for part, index, length in self._in_order(split)]

    def score(self, split: Split, outputs: np.ndarray) -> Scores:
        """Returns the published metrics and the loss.

        MNLI's test has `accuracy_mismatched` too; the predictions and labels are the matched ones.
        """
        own: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        start = 0
        for part, index, _ in self._in_order(split):
            own.setdefault(id(part), []).append((index, outputs[start : start + len(index)]))
            start += EVAL_ROWS
        first, *others = (self._scores(part, own[id(part)]) for part in self._parts[split])
        for other in others:
            named = {f"{name}_mismatched": other.metrics[name] for name in self.task.metrics}
            first.metrics.update(named)
        return first

    # For an estimate.

    def mean_batch_length(self, batch_size: int) -> float:
        """Returns the tokens of a row in a training batch, padding included, on average."""
        return float(np.mean(Batches(self._train.lengths, self._buckets, batch_size).steps(0)))

    def longest_batch(self, batch_size: int) -> Batch:
        """Returns a training batch of the longest bucket."""
        longest = np.argsort(self._train.lengths)[-batch_size:]
        return self._train.batch(longest, self.buckets[-1])

    # Inside.

    def _scores(self, part: Encoded, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> Scores:
        order, rows = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        outputs = rows[np.argsort(order)].astype(np.float64)
        if not self.task.labels:
            predictions = outputs[:, 0] * self._spread + self._centre
            loss = float(np.mean(np.square((predictions - part.labels) / self._spread)))
        else:
            predictions = outputs.argmax(-1).astype(np.int32)
            peak = outputs.max(-1, keepdims=True)
            total = peak[:, 0] + np.log(np.sum(np.exp(outputs - peak), axis=-1))
            loss = float(np.mean(total - outputs[np.arange(len(outputs)), part.labels]))
        metrics = {name: f(predictions, part.labels) for name, f in self.task.metrics.items()}
        return Scores(metrics | {"loss": loss}, predictions, part.labels)

    def _in_order(self, split: Split) -> Iterator[tuple[Encoded, np.ndarray, int]]:
        for part in self._parts[split]:
            for index, length in in_order(part.lengths, self._buckets, EVAL_ROWS):
                yield part, index, length

    def _encode(self, rows: Rows) -> Encoded:
        file, length = self.encoder.folder / "tokenizer.json", self.encoder.max_length
        if length > self._config.max_tokens:
            raise DatasetError(
                f"--max-length {length}: {self.encoder.name} has positions for "
                f"{self._config.max_tokens} tokens"
            )
        tokens = tokenize(rows.first, file, length, pairs=rows.second)
        types = tokens.token_type_ids
        highest = int(tokens.input_ids.max())
        if highest >= self._config.vocab_size:
            raise DatasetError(f"{file} has token {highest}, the model {self._config.vocab_size}")
        if types is not None and int(types.max()) >= self._config.type_vocab_size:
            raise DatasetError(
                f"{file} gives the second text token type {types.max()}, but the model has "
                f"{self._config.type_vocab_size} type(s): take the tokenizer of the same model"
            )
        self.truncated += tokens.truncated
        arrays = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        if types is not None:
            arrays["token_type_ids"] = types
        return Encoded(arrays, tokens.attention_mask.sum(1), rows.labels)


def _inputs(batch: Any) -> tuple[Any, ...]:
    """Returns the arguments of the encoder in a batch."""
    return batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")


def _filled(index: np.ndarray) -> np.ndarray:
    return np.concatenate([index, np.repeat(index[:1], EVAL_ROWS - len(index))])
