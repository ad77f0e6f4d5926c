"""The change of magnitude against the change of direction, as a picture (DoRA, Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.analysis.weight_change import WeightChange
from dora_jax.errors import DoRAError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_weight_change(
    changes: Mapping[str, WeightChange | Sequence[WeightChange]],
    ax: Axes | None = None,
    *,
    relative: bool = False,
) -> Axes:
    """Draws one point for each change, direction to the right and magnitude upwards.

    This is Figure 2 of the DoRA paper: give it the changes of one method at several checkpoints, by
    layer, and draw each method in a panel of its own. Or give it one entry for each method, with
    the changes of all layers. An entry has its own colour. The legend shows the correlation of
    dD and dM in each entry of at least three points, and in its title that of all points together.

    Args:
      changes: results of `weight_change` by layer or by method: a sequence of them, or one whose
        fields have any shape, such as `(layers,)` or `(checkpoints, layers)`.
      ax: the Axes to draw into; by default those of a new figure of `matplotlib.pyplot`.
      relative: draw `relative_magnitude` in place of `magnitude`, to compare kernels whose columns
        have different norms.

    Returns:
      The Axes.

    Raises:
      ImportError: matplotlib is not installed.
      DoRAError: there is nothing to draw.

    Example:
      >>> import jax.numpy as jnp
      >>> from matplotlib.figure import Figure
      >>> magnitude, direction = jnp.array([0.1, 0.2, 0.4]), jnp.array([0.01, 0.02, 0.04])
      >>> changes = {"query": WeightChange(magnitude, magnitude / 5, direction)}
      >>> ax = plot_weight_change(changes, Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['query (r = 1.00)']
    """
    if not changes:
        raise DoRAError("there is no change to draw: give at least one entry")
    points = {name: _points(change, relative) for name, change in changes.items()}
    if ax is None:
        ax = _new_axes()
    for color, (name, (direction, magnitude)) in zip(
        _colors(len(points)), points.items(), strict=True
    ):
        label = name + _suffix(_correlation(direction, magnitude))
        ax.scatter(direction, magnitude, s=18, color=color, alpha=0.7, linewidths=0, label=label)
    ax.set_xlabel("change of direction, dD")
    ax.set_ylabel("relative change of magnitude" if relative else "change of magnitude, dM")
    ax.margins(0.05)
    ax.grid(alpha=0.3)
    _add_legend(ax, _title(list(points.values())), len(points))
    return ax


def _points(
    changes: WeightChange | Sequence[WeightChange], relative: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns dD and dM of the changes of an entry, each flat."""
    parts = [changes] if isinstance(changes, WeightChange) else list(changes)
    directions = [np.ravel(part.direction) for part in parts]
    magnitudes = [
        np.ravel(part.relative_magnitude if relative else part.magnitude) for part in parts
    ]
    return np.concatenate(directions), np.concatenate(magnitudes)


def _correlation(direction: np.ndarray, magnitude: np.ndarray) -> float | None:
    """Returns Pearson's r of the finite points; None for fewer than three, or without spread."""
    finite = np.isfinite(direction) & np.isfinite(magnitude)
    x, y = direction[finite].astype(np.float64), magnitude[finite].astype(np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _title(points: Sequence[tuple[np.ndarray, np.ndarray]]) -> str | None:
    """Returns the legend's title: the correlation of all points, if there are several entries."""
    if len(points) == 1:
        return None
    together = _correlation(*map(np.concatenate, zip(*points, strict=True)))
    return None if together is None else f"all points{_suffix(together)}"


def _suffix(correlation: float | None) -> str:
    return "" if correlation is None else f" (r = {correlation:.2f})"


def _add_legend(ax: Axes, title: str | None, entries: int) -> None:
    """Adds the legend, to the right of the Axes if it would cover much of them."""
    outside: dict[str, Any] = (
        {} if entries <= 10 else {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    )
    columns = 1 + (entries - 1) // 24
    ax.legend(title=title, fontsize="small", framealpha=0.6, ncols=columns, **outside)


def _colors(number: int) -> list[Any]:
    """Returns distinct colours: those of matplotlib's style, or shades if it has too few."""
    if number <= 10:
        return [f"C{i}" for i in range(number)]
    from matplotlib import colormaps

    return list(colormaps["viridis"](np.linspace(0, 1, number)))


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'dora-jax[plots]'") from error
    return pyplot.subplots(layout="constrained")[1]
