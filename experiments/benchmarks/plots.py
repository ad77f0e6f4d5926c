"""Plots of the benchmark: steps by method, and curves of the overhead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_ratios(cases: Mapping[str, Any], file: Path) -> None:
    """Draws the ratio of every method's step to that of LoRA, with a panel for each case."""
    figure = Figure(figsize=(5.2 * len(cases), 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(cases)))
    for panel, case in zip(panels, cases.values(), strict=True):
        rows = [row for row in case["rows"].values() if "over_lora" in row]
        for i, row in enumerate(rows):
            _error_bar(panel, i, row["over_lora"], color=f"C{i % 10}", vertical=False)
        panel.set(title=case["title"], xlabel="step over LoRA's", yticks=range(len(rows)))
        panel.set_yticklabels([row["title"] for row in rows], fontsize=8)
        panel.axvline(1.0, color="grey", linewidth=0.8)
        panel.invert_yaxis()
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def plot_scaling(curves: Mapping[str, Any], file: Path) -> None:
    """Draws the measured overhead, the counted operations and their model, and compile times."""
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(curves)))
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        draw = _draw_compile_times if name == "compile" else _draw_overhead
        draw(panel, curve["points"])
        panel.set_xscale("log", base=2)
        panel.set(xlabel=curve["axis"], title=f"against {curve['axis']}")
        panel.set_xticks([point["x"] for point in curve["points"]])
        panel.set_xticklabels([str(point["x"]) for point in curve["points"]], fontsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(file, dpi=150)


def _draw_overhead(panel: Axes, points: list[dict[str, Any]]) -> None:
    x = [point["x"] for point in points]
    for i, (variant, title) in enumerate({"dora": "exact", "dora-detached": "detached"}.items()):
        rows = [point[variant] for point in points]
        color = f"C{i}"
        for at, row in zip(x, rows, strict=True):
            _error_bar(panel, at, row["over_lora"], color=color)
        panel.plot([], [], "o", color=color, label=f"{title}: measured")
        flops = [row["flops_over_lora"] for row in rows]
        panel.plot(x, flops, "--", color=color, label=f"{title}: operations")
        expected = [row["expected"] for row in rows]
        panel.plot(x, expected, "-", color=color, alpha=0.5, label=f"{title}: model")
    panel.set(ylabel="DoRA's step over LoRA's")


def _draw_compile_times(panel: Axes, points: list[dict[str, Any]]) -> None:
    x = [point["x"] for point in points]
    for name in [name for name in points[0] if name != "x"]:
        panel.plot(x, [point[name] for point in points], "o-", label=name)
    panel.set(ylabel="seconds to trace and compile")


def _error_bar(
    panel: Axes, at: float, ratio: Mapping[str, Any], *, color: str, vertical: bool = True
) -> None:
    """Draws a median and its quartiles."""
    median, (low, high) = ratio["median"], ratio["quartiles"]
    spread = [[median - low], [high - median]]
    if vertical:
        panel.errorbar(at, median, yerr=spread, fmt="o", color=color, capsize=3)
    else:
        panel.errorbar(median, at, xerr=spread, fmt="o", color=color, capsize=3)
