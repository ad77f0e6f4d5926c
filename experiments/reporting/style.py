"""The look of all figures: one colour and one marker for each method, text that can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The colours of Okabe and Ito, which people with any colour blindness can tell apart.
_COLOURS = {
    "full": "#4d4d4d",
    "lora": "#e69f00",
    "dora": "#0072b2",
    "dora-frozen-magnitude": "#56b4e9",
    "dora-not-normalized": "#009e73",
    "dora-detached": "#cc79a7",
    "magnitude": "#d55e00",
}
_OTHERS = ("#7f3c8d", "#8c564b", "#b8a800", "#a5aa99", "#b22222")
_MARKERS = {"full": "s", "lora": "^", "dora": "o"}
_OTHER_MARKERS = ("D", "v", "P", "X", "<", ">")

# By the number of bits of the rank: 8 is solid.
_LINES = ("-", "--", ":", "-.")

LEGEND_BELOW: dict[str, Any] = dict(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
"""For `Figure.legend`: one legend for all panels, where it hides no curve."""
WIDTH = 8.0
"""Inches across, for all figures: at 120 dots per inch, a little more than a README's width."""
DPI = 120


def colour(method: str) -> str:
    """Returns the colour of a method, by its key in `METHODS`: the same in every figure.

    What follows a slash or a comma is how it was run. A method without its own colour has one of a
    few others, which depends on its name alone.

    Example:
        >>> colour("dora") == colour("dora/8") == colour("dora, scan") != colour("lora")
        True
    """
    method = re.split("[/,]", method)[0]
    return _COLOURS.get(method) or _OTHERS[_number(method) % len(_OTHERS)]


def marker(method: str) -> str:
    """Returns the marker of a method, for those who print in grey."""
    return _MARKERS.get(method) or _OTHER_MARKERS[_number(method) % len(_OTHER_MARKERS)]


def line(method: str, rank: int) -> str:
    """Returns the style of a line: the ranks of one method differ in it."""
    return _LINES[rank.bit_length() % len(_LINES)] if method != "full" else "-"


def panels(rows: int, columns: int, *, height: float, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure of the usual width and its panels, `(rows, columns)`.

    Args:
        rows, columns: Of panels.
        height: Inches of a row.
        options: For `Figure.subplots`.
    """
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish(panel: Axes, **labels: Any) -> None:
    """Sets labels, and makes a panel plain: a pale grid, no frame above and to the right."""
    panel.set(**labels)
    panel.title.set_fontsize(9)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    for label in (panel.xaxis.label, panel.yaxis.label):
        label.set_fontsize(9)


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG without the date and the version of the program, so that it is reproducible."""
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def _number(name: str) -> int:
    return sum(name.encode())
