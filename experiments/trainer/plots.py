"""Plots of training runs: curves, the change of each layer, and a comparison of methods."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dora_jax as dora

LINEAR = dora.decomposition.KernelAxes((), (0,), (1,))


def plot_curves(metrics: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draws loss and accuracy by step: a smoothed curve for training, points for validation.

    Args:
        metrics: Lines of `metrics.jsonl`, from `experiments.tasks.metrics.read_metrics`.
        file: The PNG to write.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
        train, validation = (
            np.array([(m["step"], m[name]) for m in metrics if m["split"] == split], float)
            for split in ("train", "validation")
        )
        panel.plot(train[:, 0], train[:, 1], color="C0", alpha=0.25, linewidth=0.8)
        panel.plot(train[:, 0], _smooth(train[:, 1]), color="C0", label="training, smoothed")
        if len(validation):
            panel.plot(validation[:, 0], validation[:, 1], "o-", color="C1", label="validation")
        panel.set(xlabel="step", ylabel="cross-entropy (nats)" if name == "loss" else name)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(file, dpi=150)


def layer_changes(before: nnx.Module, after: nnx.Module) -> dict[str, dora.analysis.WeightChange]:
    """Returns the change of every linear kernel that differs, by dotted path.

    Args:
        before: The pretrained model.
        after: The merged model.
    """
    kernels = [
        {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
        for model in (before, after)
    ]
    changes = {}
    for path, old in kernels[0].items():
        new = kernels[1][path]
        if path.endswith("kernel") and not bool(jnp.array_equal(old[...], new[...])):
            changes[path.removesuffix(".kernel")] = dora.weight_change(old[...], new[...], LINEAR)
    return changes


def plot_layer_changes(changes: Mapping[str, dora.analysis.WeightChange], file: Path) -> None:
    """Draws two heat maps, of magnitude and of direction change, with a column for each layer.

    Args:
        changes: From `layer_changes`. Paths without a layer number are left out.
        file: The PNG to write.
    """
    cells = {
        m.groups(): c for p, c in changes.items() if (m := re.fullmatch(r".*\.(\d+)\.(.*)", p))
    }
    depth = 1 + max(int(layer) for layer, _ in cells)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    figure = Figure(figsize=(10, 1.4 + 0.45 * len(kinds)), layout="constrained")
    titles = {
        "relative_magnitude": "magnitude: mean |m' - m| / m",
        "direction": "direction: mean 1 - cos(V', W)",
    }
    for panel, (field, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        values = np.full((len(kinds), depth), np.nan)
        for (layer, kind), change in cells.items():
            values[kinds.index(kind), int(layer)] = getattr(change, field)
        _heat_map(panel, values, kinds, title)
    figure.savefig(file, dpi=150)


def _heat_map(panel: Axes, values: np.ndarray, rows: Sequence[str], title: str) -> None:
    image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    panel.set(title=title, xlabel="layer", xticks=range(values.shape[1]), yticks=range(len(rows)))
    panel.set_yticklabels(rows)
    middle = np.nanmax(values) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value < middle else "black"
        panel.text(column, row, f"{value:.2g}", ha="center", va="center", color=color, fontsize=7)
    panel.figure.colorbar(image, ax=panel)


def _smooth(values: np.ndarray, width: int = 20) -> np.ndarray:
    """Returns the running mean over the last `width` steps."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)
