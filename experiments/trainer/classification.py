"""Training a classifier of texts: its schedule, its loss and its evaluation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dora_jax as dora
from experiments.tasks.task import Examples, Task
from experiments.tasks.text import EVAL_BATCH, eval_batches, train_batches
from experiments.trainer.loop import Training
from experiments.trainer.placement import own_rows
from experiments.trainer.settings import TrainerSettings
from experiments.trainer.step import WEIGHT

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The length of a training run, its batches and its learning rate.

    Attributes:
        learning_rate: The peak. It is reached after the warm-up and falls to 0 along a cosine.
        epochs: Passes over the training texts.
        batch_size: Texts per step.
        warmup: Share of all steps in which the learning rate rises.
        seed: Seed of the order of the texts.
        checkpoint_every: Steps between two checkpoints, if checkpoints are saved.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    warmup: float = 0.1
    seed: int = 0
    checkpoint_every: int = 50

    def steps_per_epoch(self, examples: Examples) -> int:
        """Steps of one pass; the texts that do not fill a batch are left out."""
        return len(examples) // self.batch_size

    def learning_rates(self, examples: Examples) -> optax.Schedule:
        """The learning rate of each step, for training on these examples."""
        return self.over(self.epochs * self.steps_per_epoch(examples))

    def over(self, steps: int) -> optax.Schedule:
        """The learning rate of each step, for a run of `steps` steps."""
        warmup = max(1, round(self.warmup * steps))
        return optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)


def cross_entropy(
    model: nnx.Module, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean cross-entropy (nats) and the accuracy of a batch, weighted."""
    logits = predict(model, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    weight = batch["weight"]
    accuracy = jnp.average(correct, weights=weight)
    return jnp.average(losses, weights=weight), {"accuracy": accuracy, WEIGHT: jnp.sum(weight)}


def predict(model: nnx.Module, batch: Batch) -> Float[Array, "text class"]:
    """Returns the logits, in float32."""
    return model(batch["input_ids"], batch["attention_mask"]).astype(jnp.float32)


jit_predict = nnx.jit(predict)


def evaluate(model: nnx.Module, examples: Examples) -> dict[str, float]:
    """Returns the mean cross-entropy and the accuracy over all examples, without dropout."""
    logits = logits_of(model, examples)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
    correct = logits.argmax(-1) == examples.labels
    return {"loss": float(losses.mean()), "accuracy": float(correct.mean())}


def logits_of(model: nnx.Module, examples: Examples) -> np.ndarray:
    """Returns the logits of all examples, float32 (text, class), without dropout."""
    evaluated = nnx.view(model, deterministic=True)
    batches = eval_batches(examples.tokens, examples.labels, EVAL_BATCH)
    return np.concatenate([np.asarray(jit_predict(evaluated, b)) for b in batches])[: len(examples)]


def example_call(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arguments of a model's call on the first example."""
    tokens = examples.first(1).tokens
    return tokens.input_ids, tokens.attention_mask


def classifier_training(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    task: Task,
    schedule: Schedule,
    settings: TrainerSettings,
    *,
    config: dora.DoRAConfig | None = None,
    title: str = "training",
) -> Training:
    """Returns what `fit` takes: training texts, and an evaluation after each pass over them.

    Args:
        model: The model to train.
        optimizer: Its optimiser.
        task: The training texts and the validation texts.
        schedule: The number of steps, the batches and the interval of the checkpoints.
        settings: The devices, which say what this process reads of a batch.
        config: The configuration of the adapters: checkpoints and the best adapters are kept.
        title: Label of the progress line.
    """
    per_epoch = schedule.steps_per_epoch(task.train)
    batches = train_batches(
        task.train.tokens,
        task.train.labels,
        schedule.batch_size,
        seed=schedule.seed,
        rows=own_rows(settings.device_mesh(), schedule.batch_size),
    )
    return Training(
        model=model,
        optimizer=optimizer,
        loss=cross_entropy,
        batches=batches,
        steps=per_epoch * schedule.epochs,
        config=config,
        checkpoint_every=schedule.checkpoint_every,
        evaluate=lambda model: evaluate(model, task.validation),
        evaluate_every=per_epoch,
        best=None if config is None else "loss",
        title=title,
    )


def count(model: nnx.Module, trainable: Any) -> int:
    """Returns the number of parameters in the variables that a filter selects."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, trainable)))
