"""Measures a model against its pretrained base in the course of training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

import dora_jax as dora
from dora_jax.analysis import change_rank
from experiments.trainer.methods import HEAD
from experiments.trainer.plots import LINEAR, layer_changes

if TYPE_CHECKING:
    from jax import Array


class Recorder:
    """Measures a model against its base whenever it is called; for `Training.evaluate`.

    Args:
        base: The pretrained model.
        every: Steps between two calls. There is one more after the last step.
        steps: Number of all steps.
    """

    def __init__(self, base: nnx.Module, *, every: int, steps: int) -> None:
        self.base, self.every, self.steps = base, every, steps
        self._rows: list[dict[str, Any]] = []
        self._calls = 0

    def __call__(self, model: nnx.Module) -> dict[str, float]:
        """Records all layers; returns the mean dM and dD."""
        self._calls += 1
        step = min(self._calls * self.every, self.steps)
        adapted = bool(jax.tree.leaves(nnx.state(model, dora.DoRAParam)))
        plain = dora.merge(model) if adapted else model
        changes = layer_changes(self.base, plain)
        changes.pop(HEAD, None)  # it starts from random numbers, not from a pretrained kernel
        rows: list[dict[str, Any]] = [
            {"step": step, "layer": layer, **{k: float(x) for k, x in change._asdict().items()}}
            for layer, change in changes.items()
        ]
        if step == self.steps:
            before, after = (_kernels(m) for m in (self.base, plain))
            for row in rows:
                rank = change_rank(before[row["layer"]], after[row["layer"]], LINEAR)
                row |= {
                    "effective_rank": float(rank.effective),
                    "stable_rank": float(rank.stable),
                    "relative_norm": float(rank.relative_norm),
                }
        self._rows += rows
        names = ("magnitude", "direction")
        return {name: float(np.mean([row[name] for row in rows])) for name in names} if rows else {}

    def lines(self) -> str:
        """Returns what was recorded, as lines of JSON."""
        return "".join(json.dumps(row) + "\n" for row in self._rows)


def _kernels(model: nnx.Module) -> dict[str, Array]:
    """Returns the kernels of a plain model by the dotted path of their layer."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path[:-1])): x[...] for path, x in state if path[-1] == "kernel"}
