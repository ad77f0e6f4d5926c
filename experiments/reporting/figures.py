"""The figures of reports, in the style of `style.py`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from experiments.reporting import style
from experiments.reporting.statistics import Interval, mean_interval
from experiments.reporting.variants import Variant
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
            title = _correlation(r) if row else f"{METHODS[method].title}\n{_correlation(r)}"
            left = {} if column else {"ylabel": f"{name}:\ndM = mean |m' − m|"}
            style.finish(panel, title=title, **left)
    figure.supxlabel("change of direction, dD = mean (1 − cos)", fontsize=9)
    style.save(figure, file)


def plot_rates(variants: Sequence[Variant], file: Path) -> None:
    """Draws the validation metric by learning rate, with a panel for each task.

    Bars are the range over seeds, and a ring is around the rate that was chosen. Only the variants
    of the most usual settings are drawn.

    Args:
        variants: Of one experiment.
        file: The PNG to write.
    """
    drawn = _usual(variants)
    figure, panels = _panel_a_task(drawn)
    for task, panel in panels.items():
        rates = sorted({rate for v in drawn if v.task == task for rate in v.curve})
        for variant in [v for v in drawn if v.task == task]:
            _draw_curve(panel, variant, _dodge(variant, drawn))
        metric = next(v.metric for v in drawn if v.task == task)
        panel.set_xscale("log")
        style.finish(
            panel,
            title=f"{task} ({metric})",
            xlabel="peak learning rate",
            ylabel="validation score (× 100)",
        )
        panel.set_xticks(rates, list(map(_power, rates)), rotation=60, fontsize=7)
        panel.minorticks_off()
    _legend(figure, panels.values())
    style.save(figure, file)


def plot_scores(variants: Sequence[Variant], file: Path) -> None:
    """Draws the score of each method with its interval over seeds, with a panel for each task.

    Args:
        variants: Of one experiment; the ones of the most usual settings are drawn, and the base.
        file: The PNG to write.
    """
    drawn = [*_usual(variants), *(v for v in variants if not v.is_trained)]
    titles = list(dict.fromkeys(variant.title for variant in drawn))
    figure, panels = _panel_a_task(drawn, sharey=True, height=1.1 + 0.22 * len(titles))
    for task, panel in panels.items():
        of_task = [v for v in drawn if v.task == task]
        for variant in of_task:
            at, score = titles.index(variant.title), variant.score().scaled(100)
            colour, marker = style.colour(variant.method), style.marker(variant.method)
            points = 100 * np.array(list(variant.scores().values()))
            panel.plot(points, np.full(len(points), at + 0.22), ".", color=colour, alpha=0.6, ms=4)
            spread = [[score.value - score.low], [score.high - score.value]]
            bar: dict[str, Any] = {"xerr": spread} if score.known else {}
            panel.errorbar(score.value, at, fmt=marker, color=colour, capsize=3, ms=6, **bar)
        _widen(panel)
        split = "test" if of_task[0].is_tested else "validation"
        style.finish(panel, title=f"{task}, {split}", xlabel=f"{of_task[0].metric} (× 100)")
        panel.set_yticks(range(len(titles)), titles)
        panel.set_ylim(len(titles) - 0.5, -0.5)
    style.save(figure, file)


def _widen(panel: Axes, least: float = 2.0) -> None:
    """Makes the x axis of a panel at least so long: a difference that is nothing must look so."""
    low, high = panel.get_xlim()
    more = max(0.0, least - (high - low)) / 2
    panel.set_xlim(low - more, high + more)


def _power(x: float) -> str:
    """Returns a number as a mantissa and an exponent.

    Example:
        >>> _power(0.00015), _power(2.0)
        ('1.5e-4', '2e0')
    """
    exponent = math.floor(math.log10(x))
    return f"{x / 10**exponent:.3g}e{exponent}"


def _usual(variants: Sequence[Variant]) -> list[Variant]:
    """Returns the trained variants whose settings are the most frequent ones of their task."""
    found = []
    variants = [variant for variant in variants if variant.is_trained]
    for task in dict.fromkeys(variant.task for variant in variants):
        of_task = [variant for variant in variants if variant.task == task]
        usual = Counter(variant.settings for variant in of_task).most_common(1)[0][0]
        found += [variant for variant in of_task if variant.settings == usual]
    return found


def _panel_a_task(
    variants: Sequence[Variant], *, sharey: bool = False, height: float = 2.6
) -> tuple[Any, dict[str, Axes]]:
    tasks = list(dict.fromkeys(variant.task for variant in variants))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = style.panels(rows, columns, height=height, sharey=sharey)
    for unused in axes.ravel()[len(tasks) :]:
        unused.set_axis_off()
    return figure, dict(zip(tasks, axes.ravel(), strict=False))


def _draw_curve(panel: Axes, variant: Variant, dodge: float) -> None:
    rates = np.array(list(variant.curve)) * dodge
    by_rate = [100 * np.array(list(seeds.values())) for seeds in variant.curve.values()]
    means = np.array([mean_interval(values.tolist()).value for values in by_rate])
    spread = [means - [v.min() for v in by_rate], [v.max() for v in by_rate] - means]
    colour, marker = style.colour(variant.method), style.marker(variant.method)
    panel.errorbar(
        rates,
        means,
        yerr=spread,
        fmt=f"{marker}{style.line(variant.method, variant.rank)}",
        color=colour,
        capsize=2,
        ms=4,
        linewidth=1.3,
        elinewidth=0.8,
        label=variant.title,
    )
    at = list(variant.curve).index(variant.rate)
    panel.plot(rates[at], means[at], "o", ms=10, mfc="none", mec=colour, mew=1.2)


def _dodge(variant: Variant, drawn: Sequence[Variant]) -> float:
    """Returns a factor near 1 for the rates, so that bars of equal rates stand side by side."""
    titles = list(dict.fromkeys(v.title for v in drawn))
    return float(1.04 ** (titles.index(variant.title) - (len(titles) - 1) / 2))


def _legend(figure: Any, panels: Any) -> None:
    """Puts one legend for all panels below them, where it hides no curve."""
    entries: dict[str, Any] = {}
    for panel in panels:
        entries |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, **style.LEGEND_BELOW)


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
