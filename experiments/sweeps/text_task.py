"""Classification of texts as a task for sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optax
from flax import nnx

from experiments.sweeps.task import Batch, Scores, Split
from experiments.tasks.task import Examples, Task
from experiments.tasks.text import EVAL_BATCH, eval_batches, train_batches
from experiments.trainer.classification import cross_entropy, example_call, predict
from experiments.trainer.methods import HEAD

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A `SweepTask` of texts with one class each, chosen by accuracy.

    Attributes:
        task: The pretrained encoder and its texts.
        name: As in `SweepTask`, like the others.
        base: The same.
        metric: The same.
        switches: Further arguments of `task.model`, such as `dtype`.
    """

    task: Task
    name: str = "sarcasm"
    base: str = "MiniLM"
    metric: str = "accuracy"
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Tokens of each text."""
        return self.task.train.tokens.input_ids.shape[1]

    @property
    def train_examples(self) -> int:
        """Number of training texts."""
        return len(self.task.train)

    @property
    def fields(self) -> Mapping[str, Any]:
        """All linear layers are adapted, and the head is trained in full."""
        return {"modules_to_save": (HEAD,)}

    def model(self, seed: int) -> nnx.Module:
        """Returns the encoder with a new head."""
        return self.task.model(seed, **self.switches)

    def example_call(self) -> tuple[Any, ...]:
        """Returns the first text."""
        return example_call(self.task.train)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Returns shuffled batches, in another order every epoch."""
        train = self.task.train
        return iter(train_batches(train.tokens, train.labels, batch_size, seed=seed))

    def loss(
        self, model: nnx.Module, batch: Any
    ) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
        """Returns the cross-entropy and the accuracy."""
        return cross_entropy(model, batch)

    def predict(self, model: nnx.Module, batch: Any) -> Float[Array, "text class"]:
        """Returns the logits."""
        return predict(model, batch)

    def eval_batches(self, split: Split) -> Sequence[Batch]:
        """Returns the texts in order; the last batch is filled up."""
        examples = self._examples(split)
        return list(eval_batches(examples.tokens, examples.labels, EVAL_BATCH))

    def score(self, split: Split, outputs: np.ndarray) -> Scores:
        """Returns the accuracy and the cross-entropy (nats)."""
        labels = self._examples(split).labels
        logits = outputs[: len(labels)]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        chosen = logits.argmax(-1)
        metrics = {"accuracy": float((chosen == labels).mean()), "loss": float(losses.mean())}
        return Scores(metrics, chosen, labels)

    def _examples(self, split: Split) -> Examples:
        return {"validation": self.task.validation, "test": self.task.test}[split]
