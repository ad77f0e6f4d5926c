"""The figures of reports, in the style of `style.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from experiments.reporting import style
from experiments.reporting.statistics import Interval
from experiments.trainer.methods import METHODS


def plot_decomposition(panels: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draws dM over dD: a column of panels for each method, a row for each selection of layers.

    Points become darker in the course of training. Each panel has its own axes: the methods move
    kernels by very different amounts, and it is the slope that is compared.

    Args:
        panels: By method and selection: an array `(3, point)` of dD, dM and the share of training
            that was done, and the correlation.
        file: The PNG to write.
    """
    rows = list(dict.fromkeys(name for of_method in panels.values() for name in of_method))
    figure, axes = style.panels(len(rows), len(panels), height=2.7)
    for column, (method, of_method) in enumerate(panels.items()):
        for row, name in enumerate(rows):
            panel = axes[row, column]
            if name not in of_method:
                panel.set_axis_off()
                continue
            points, r = of_method[name]
            _scatter(panel, points, style.colour(method), style.marker(method))
            style.finish(panel, title=f"{METHODS[method].title}\n{name}: {_correlation(r)}")
    figure.supxlabel("change of direction, dD = mean (1 − cos)", fontsize=9)
    figure.supylabel("change of magnitude, dM = mean |m' − m|", fontsize=9)
    style.save(figure, file)


def _scatter(panel: Axes, points: Any, colour: str, marker: str) -> None:
    shades = LinearSegmentedColormap.from_list("", ["#e4e4e4", colour])
    direction, magnitude, done = points
    order = done.argsort()
    panel.scatter(
        direction[order],
        magnitude[order],
        c=0.25 + 0.75 * done[order],
        cmap=shades,
        vmin=0,
        vmax=1,
        s=14,
        marker=marker,
        linewidths=0,
        alpha=0.85,
    )
    panel.margins(0.06)
    panel.ticklabel_format(scilimits=(-2, 3), useMathText=True)
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_offset_text().set_fontsize(8)


def _correlation(r: Interval) -> str:
    text = f"r = {r.value:+.2f}"
    return f"{text} ({r.low:+.2f} to {r.high:+.2f})" if r.known else text
