"""Plots of the benchmark: steps by method, and curves of the overhead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting import style


def plot_ratios(cases: Mapping[str, Any], file: Path) -> None:
    """Draws the ratio of every method's step to that of LoRA, with a panel for each case."""
    figure, panels = _panels(len(cases), height=2.9)
    for panel, case in zip(panels, cases.values(), strict=True):
        rows = {name: row for name, row in case["rows"].items() if "over_lora" in row}
        for i, (name, row) in enumerate(rows.items()):
            _error_bar(panel, i, row["over_lora"], color=style.colour(name), vertical=False)
        title = case["title"].replace(", ", "\n", 1)
        style.finish(panel, title=title, xlabel="step over LoRA's")
        panel.set_yticks(range(len(rows)), [row["title"] for row in rows.values()], fontsize=7)
        panel.axvline(1.0, color="grey", linewidth=0.8)
        panel.invert_yaxis()
    style.save(figure, file)


def plot_scaling(curves: Mapping[str, Any], file: Path) -> None:
    """Draws the measured overhead, the counted operations and their model, and compile times."""
    figure, panels = _panels(len(curves), height=2.9)
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        draw = _draw_compile_times if name == "compile" else _draw_overhead
        draw(panel, curve["points"])
        panel.set_xscale("log", base=2)
        style.finish(panel, xlabel=curve["axis"], title=f"against {curve['axis']}")
        xs = [point["x"] for point in curve["points"]]
        panel.set_xticks(xs, [str(x) for x in xs])
        panel.legend(fontsize=7)
    style.save(figure, file)


def _panels(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with two panels in a row."""
    columns = min(2, count)
    figure, axes = style.panels(-(-count // columns), columns, height=height)
    for unused in axes.ravel()[count:]:
        unused.set_axis_off()
    return figure, list(axes.ravel()[:count])


def _draw_overhead(panel: Axes, points: list[dict[str, Any]]) -> None:
    x = [point["x"] for point in points]
    for variant, title in {"dora": "exact", "dora-detached": "detached"}.items():
        rows = [point[variant] for point in points]
        color = style.colour(variant)
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
        times = [point[name] for point in points]
        line = "o--" if name.endswith("scan") else "o-"
        panel.plot(x, times, line, color=style.colour(name), label=name)
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
