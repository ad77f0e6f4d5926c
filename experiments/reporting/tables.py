"""One table, rendered as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from experiments.reporting.statistics import Interval

Cell: TypeAlias = str | int | float | Interval | None

_MISSING = "–"
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "|": r"$|$",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its heading, and how its numbers are written.

    Attributes:
        name: The heading, with the unit if there is one.
        digits: Decimals of a float; None for at most four significant digits.
        signed: Whether positive numbers have a plus, as differences do.
    """

    name: str
    digits: int | None = None
    signed: bool = False

    def text(self, cell: Cell) -> str:
        """Returns a cell as text; a dash for what is not known.

        Example:
            >>> Column("F1 (%)", 1).text(Interval(86.44, 85.9, 86.93))
            '86.4 (85.9 to 86.9)'
            >>> Column("F1 (%)", 1).text(None)
            '–'
        """
        if isinstance(cell, Interval):
            value = self._number(cell.value)
            if not cell.known:
                return value
            return f"{value} ({self._number(cell.low)} to {self._number(cell.high)})"
        if isinstance(cell, float):
            return self._number(cell)
        if isinstance(cell, int):
            return f"{cell:,}"
        return _MISSING if cell is None else cell

    def _number(self, x: float) -> str:
        if math.isnan(x):
            return _MISSING
        sign = "+" if self.signed else ""
        return f"{x:{sign}.4g}" if self.digits is None else f"{x:{sign}.{self.digits}f}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under headings.

    Attributes:
        columns: The headings.
        rows: As many cells in each as there are columns.
        caption: What the table shows, and what its intervals are over.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} headings")

    def without_empty_columns(self) -> Table:
        """Returns the table without columns of which nothing is known."""
        kept = [i for i in range(len(self.columns)) if any(not _empty(row[i]) for row in self.rows)]
        return self.only(*(self.columns[i].name for i in kept), caption=self.caption)

    def only(self, *names: str, caption: str = "") -> Table:
        """Returns the columns of these names, where the table has them, and another caption."""
        kept = [i for i, column in enumerate(self.columns) if column.name in names]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(tuple(self.columns[i] for i in kept), rows, caption)

    def markdown(self) -> str:
        """Returns the table in Markdown; the caption is a paragraph after it."""
        lines = [self._names(), ["---"] * len(self.columns), *self._texts()]
        text = "\n".join("| " + " | ".join(c.replace("|", r"\|") for c in x) + " |" for x in lines)
        return text + (f"\n\n{self.caption}" if self.caption else "")

    def csv(self) -> str:
        """Returns the table as CSV, unrounded; an interval has three columns."""
        wide = [
            any(isinstance(r[i], Interval) for r in self.rows) for i in range(len(self.columns))
        ]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        names: list[str] = []
        for column, is_wide in zip(self.columns, wide, strict=True):
            names += [column.name, *([f"{column.name}, low", f"{column.name}, high"] * is_wide)]
        writer.writerow(names)
        for row in self.rows:
            cells: list[Cell] = []
            for cell, is_wide in zip(row, wide, strict=True):
                if isinstance(cell, Interval):
                    cells += cell
                else:
                    cells += [cell, None, None] if is_wide else [cell]
            writer.writerow(["" if _empty(cell) else cell for cell in cells])
        return stream.getvalue()

    def latex(self) -> str:
        """Returns the table as a LaTeX `tabular` (with the package booktabs), text escaped."""
        lines = [
            r" & ".join(map(_escaped, row)) + r" \\" for row in [self._names(), *self._texts()]
        ]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{'l' * len(self.columns)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                *([f"% {self.caption}"] if self.caption else []),
            ]
        )

    def records(self) -> list[dict[str, object]]:
        """Returns the rows as JSON, unrounded; an interval is a list of three numbers."""

        def plain(cell: Cell) -> object:
            numbers: list[float | None] = [None if math.isnan(x) else x for x in _numbers(cell)]
            if isinstance(cell, Interval):
                return numbers
            return numbers[0] if numbers else cell

        return [dict(zip(self._names(), map(plain, row), strict=True)) for row in self.rows]

    def write(self, folder: Path, name: str) -> None:
        """Writes `name.csv` and `name.tex` into a folder."""
        (folder / f"{name}.csv").write_text(self.csv(), encoding="utf-8")
        (folder / f"{name}.tex").write_text(self.latex() + "\n", encoding="utf-8")

    def _names(self) -> list[str]:
        return [column.name for column in self.columns]

    def _texts(self) -> list[Sequence[str]]:
        return [
            [c.text(cell) for c, cell in zip(self.columns, row, strict=True)] for row in self.rows
        ]


def _numbers(cell: Cell) -> list[float]:
    if isinstance(cell, Interval):
        return list(cell)
    return [cell] if isinstance(cell, float) else []


def _empty(cell: Cell) -> bool:
    return cell is None or cell == "" or any(map(math.isnan, _numbers(cell)[:1]))


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
