"""The training loop of the experiments. It can be resumed, shows progress and writes metrics."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import dora_jax as dora
from experiments.tasks.metrics import MetricsWriter
from experiments.tasks.task import Examples, Task
from experiments.tasks.text import EVAL_BATCH, eval_batches, train_batches

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


class DivergedError(RuntimeError):
    """A loss or a gradient is not finite; names the step and the layers, in one line."""


def cross_entropy(model: nnx.Module, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean cross-entropy (nats) and the accuracy of a batch, weighted."""
    logits = predict(model, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    weight = batch["weight"]
    return jnp.average(losses, weights=weight), jnp.average(correct, weights=weight)


def predict(model: nnx.Module, batch: Batch) -> Float[Array, "text class"]:
    """Returns the logits, in float32."""
    return model(batch["input_ids"], batch["attention_mask"]).astype(jnp.float32)


jit_predict = nnx.jit(predict)


@nnx.jit
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " variable"]]:
    """Takes one step, in place. The gradient is taken of the trained variables alone.

    Returns:
        The loss, the accuracy, and the squared norm of each variable's gradient. Clipping needs
        those norms anyway.
    """
    trainable = nnx.DiffState(0, optimizer.wrt)
    (loss, accuracy), grads = nnx.value_and_grad(cross_entropy, argnums=trainable, has_aux=True)(
        model, batch
    )
    optimizer.update(model, grads)
    squares = jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)])
    return loss, accuracy, squares


def check_finite(
    step: int, loss: float, squares: np.ndarray, model: nnx.Module, trained: Any
) -> None:
    """Raises `DivergedError` unless the loss and all gradients of a step are finite.

    Args:
        step: Its number.
        loss: Its loss.
        squares: The squared norm of each trained variable's gradient, as `train_step` returns them.
        model: The model.
        trained: The type of the variables that are trained.
    """
    if np.isfinite(loss) and np.isfinite(squares).all():
        return
    paths = [path for path, _ in jax.tree.leaves_with_path(nnx.state(model, trained))]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    layers = [name.removesuffix(".value").rpartition(".")[0] for name in names]
    found = list(dict.fromkeys(np.array(layers)[~np.isfinite(squares)].tolist()))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    where = f"; not finite are the gradients of {', '.join(found[:3])}{more}" if found else ""
    raise DivergedError(
        f"The training diverged at step {step}: the loss is {loss:.4g}{where}. Nothing of this "
        "step is saved, and earlier checkpoints stay. Try a lower learning rate."
    )


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


def fit(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    task: Task,
    schedule: Schedule,
    writer: MetricsWriter,
    *,
    checkpoints: dora.Checkpoints | None = None,
    title: str = "training",
) -> float | None:
    """Trains in place, and evaluates on the validation texts after each epoch.

    With `checkpoints`, the run resumes from the newest checkpoint, if there is one. It then ends
    with the same bits as an uninterrupted run. A checkpoint is saved every
    `schedule.checkpoint_every` steps and after the last step.

    Args:
        model: The model to train.
        optimizer: Its optimiser.
        task: The training texts and the validation texts.
        schedule: The number of steps, the batches and the interval of the checkpoints.
        writer: Receives the metrics of every step.
        checkpoints: Where to save and to resume from.
        title: Label of the progress bar.

    Returns:
        Median seconds per step. The first two steps of this process are left out: they compile.
        None if this process took no others.

    Raises:
        DivergedError: A loss or a gradient is not finite. The model is then of no use; the
            checkpoints and the metrics are those of the steps before.
    """
    batches = train_batches(
        task.train.tokens, task.train.labels, schedule.batch_size, seed=schedule.seed
    )
    per_epoch = schedule.steps_per_epoch(task.train)
    total = per_epoch * schedule.epochs
    restored = checkpoints and checkpoints.restore(model, optimizer, data=batches)
    first = restored.step if restored else 0
    model.train()
    seconds: list[float] = []
    with _progress(title, total, first, schedule.batch_size) as bar:
        for step in range(first + 1, total + 1):
            start = time.perf_counter()
            loss, accuracy, squares = map(np.asarray, train_step(model, optimizer, next(batches)))
            seconds.append(time.perf_counter() - start)
            check_finite(step, float(loss), squares, model, optimizer.wrt)
            writer.write(step, "train", {"loss": loss, "accuracy": accuracy})
            shown = {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.2f}"}
            bar.set_postfix(step=f"{step}/{total}", **shown, refresh=False)
            bar.update(schedule.batch_size)
            if step % per_epoch == 0:
                values = evaluate(model, task.validation)
                check_finite(step, values["loss"], np.zeros(0), model, optimizer.wrt)
                writer.write(step, "validation", values)
                _print_validation(bar, f"{step // per_epoch}/{schedule.epochs}", values)
            if checkpoints and (step % schedule.checkpoint_every == 0 or step == total):
                checkpoints.save(step, model, optimizer, data=batches)
    return float(np.median(seconds[2:])) if len(seconds) > 2 else None


def _print_validation(bar: Any, epoch: str, values: dict[str, float]) -> None:
    bar.write(
        f"epoch {epoch}: validation loss {values['loss']:.4f}, accuracy {values['accuracy']:.4f}",
        file=sys.stdout,
    )


def _progress(title: str, total: int, first: int, batch_size: int) -> Any:
    """Returns a progress bar. In a log file it is a new line every 15 seconds."""
    return tqdm(
        desc=title,
        total=total * batch_size,
        initial=first * batch_size,
        unit=" examples",
        mininterval=0.2 if sys.stderr.isatty() else 15,
        dynamic_ncols=True,
    )


def count(model: nnx.Module, trainable: Any) -> int:
    """Returns the number of parameters in the variables that a filter selects."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, trainable)))
