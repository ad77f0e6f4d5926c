"""A baseline without fine-tuning: logistic regression on the features of the frozen encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.models.bert_classifier import BertClassifier
from experiments.tasks.task import Examples, Task
from experiments.tasks.text import EVAL_BATCH, eval_batches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Weights of the L2 penalty. The validation texts choose among them.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def probe_accuracy(model: BertClassifier, task: Task) -> float:
    """Returns the test accuracy of a logistic regression on the frozen encoder's pooled features.

    Features are standardised with the mean and the standard deviation of the training texts. The
    penalty is the one with the best accuracy on the validation texts.
    """
    train, validation, test = (
        _features(model, e) for e in (task.train, task.validation, task.test)
    )
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, validation, test = ((x - mean) / deviation for x in (train, validation, test))
    fits = [logistic_regression(train, task.train.labels, penalty) for penalty in PENALTIES]
    best = max(fits, key=lambda fit: _accuracy(fit, validation, task.validation.labels))
    return _accuracy(best, test, task.test.labels)


def logistic_regression(
    features: Float[np.ndarray, "text feature"], labels: np.ndarray, penalty: float
) -> dict[str, Array]:
    """Fits weights (feature, class) and bias (class,) by L-BFGS, with an L2 penalty on the weights.

    Example:
        >>> x = np.array([[-1.0], [-2.0], [1.0], [2.0]], np.float32)
        >>> fit = logistic_regression(x, np.array([0, 0, 1, 1]), penalty=1e-2)
        >>> (x @ np.asarray(fit["weights"]) + np.asarray(fit["bias"])).argmax(-1).tolist()
        [0, 0, 1, 1]
    """
    classes = int(labels.max()) + 1
    start = {"weights": jnp.zeros((features.shape[1], classes)), "bias": jnp.zeros(classes)}
    fit = _fit(start, jnp.asarray(features), jnp.asarray(labels), penalty)
    if not all(np.isfinite(x).all() for x in fit.values()):
        raise FloatingPointError(
            f"the logistic regression with penalty {penalty:g} is not finite: is the checkpoint "
            "of the encoder damaged?"
        )
    return fit


@jax.jit
def _fit(start: dict[str, Array], x: Array, labels: Array, penalty: Array) -> dict[str, Array]:
    def loss(fit: dict[str, Array]) -> Array:
        logits = x @ fit["weights"] + fit["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + penalty * jnp.sum(jnp.square(fit["weights"]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        fit, state = carry
        value, grad = value_and_grad(fit, state=state)
        updates, state = solver.update(grad, state, fit, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(fit, updates), state), None

    (fit, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=100)
    return fit


@nnx.jit
def _pooled(model: BertClassifier, batch: dict[str, np.ndarray]) -> Array:
    return model.features(batch["input_ids"], batch["attention_mask"])


def _features(model: BertClassifier, examples: Examples) -> Float[np.ndarray, "text feature"]:
    batches = eval_batches(examples.tokens, examples.labels, EVAL_BATCH)
    return np.concatenate([np.asarray(_pooled(model, b)) for b in batches])[: len(examples)]


def _accuracy(fit: dict[str, Array], features: np.ndarray, labels: np.ndarray) -> float:
    logits = features @ np.asarray(fit["weights"]) + np.asarray(fit["bias"])
    return float((logits.argmax(-1) == labels).mean())
