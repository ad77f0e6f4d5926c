"""Tables and numbers in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned columns, the first to the left and the others to the right.

    Example:
      >>> print(table(("layer", "rank"), [("q_proj", "8")]))
      layer   rank
      q_proj     8
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    )


def number(x: float | None) -> str:
    """Returns a number with four digits, a dash for none."""
    return "-" if x is None else f"{x:.4g}"


def percent(x: float | None) -> str:
    """Returns a share in per cent, a dash for none."""
    return "-" if x is None else f"{x:.2%}"


def size(count: int) -> str:
    """Returns a number of bytes, in units of 1000.

    Example:
      >>> size(1_380_000)
      '1.38 MB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
