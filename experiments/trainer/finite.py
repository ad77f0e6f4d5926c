"""The guard against a training that diverges: names the layers that are not finite."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx


class DivergedError(RuntimeError):
    """A loss or a gradient is not finite; names the step and the layers, in one line."""


def check_finite(
    step: int, loss: float, squares: np.ndarray, model: nnx.Module, trained: Any
) -> None:
    """Raises `DivergedError` unless the loss and all gradients of a step are finite.

    Args:
        step: Its number.
        loss: Its loss.
        squares: The squared norm of each trained variable's gradient, as `TrainStep` returns them.
        model: The model. Its arrays are not read.
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


def check_evaluation(step: int, values: dict[str, float]) -> None:
    """Raises `DivergedError` unless all figures of an evaluation are finite."""
    if broken := [name for name, value in values.items() if not np.isfinite(value)]:
        raise DivergedError(
            f"The training diverged at step {step}: the validation {broken[0]} is "
            f"{values[broken[0]]:.4g}. Nothing of this step is saved, and earlier checkpoints "
            "stay. Try a lower learning rate."
        )
