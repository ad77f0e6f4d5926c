"""`dora-jax inspect`: a summary of an adapter folder; and the tables that commands print."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from dora_jax.cli.folders import AdapterFolder, LayerAdapter, read_folder


def inspect(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns a summary of an adapter folder, as JSON types and as text."""
    found = read_folder(folder)
    report = {
        "path": found.path,
        "format": found.format,
        "dora_jax_version": found.version,
        "bytes": found.bytes,
        "parameters": found.counts(),
        "config": found.config,
        "layers": [_row(layer) for layer in found.layers],
        "saved": {name: list(x.shape) for name, x in sorted(found.saved.items())},
    }
    return report, _text(found, report)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a text table, its first column aligned to the left and the others to the right.

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
    """Returns a number with four digits; a dash for None."""
    return "-" if x is None else f"{x:.4g}"


def percent(x: float | None) -> str:
    """Returns a share in per cent; a dash for None."""
    return "-" if x is None else f"{x:.2%}"


def size(count: int) -> str:
    """Returns a number of bytes, in units of a power of 1000.

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


def _row(layer: LayerAdapter) -> dict[str, Any]:
    drift = layer.drift()
    return {
        "path": layer.path,
        "rank": layer.rank,
        "alpha": layer.alpha,
        "scaling": layer.scaling,
        "shapes": {name: list(x.shape) for name, x in sorted(layer.arrays.items())},
        "dtypes": sorted({x.dtype.name for x in layer.arrays.values()}),
        "parameters": layer.parameters,
        "product_norm": layer.product_norm(),
        "magnitude_drift_mean": drift and drift[0],
        "magnitude_drift_max": drift and drift[1],
    }


def _text(found: AdapterFolder, report: dict[str, Any]) -> str:
    header = ("layer", "rank", "alpha", "parameters", "|sAB|", "drift of m", "largest")
    rows = [
        (
            row["path"] or "(root)",
            str(row["rank"]),
            f"{row['alpha']:g}",
            f"{row['parameters']:,}",
            number(row["product_norm"]),
            percent(row["magnitude_drift_mean"]),
            percent(row["magnitude_drift_max"]),
        )
        for row in report["layers"]
    ]
    written = f", written by dora_jax {found.version}" if found.version else ""
    kind = {"orbax": "Orbax", "peft": "PEFT"}[found.format]
    lines = [f"{found.path}: {kind} adapter{written}, {size(found.bytes)}", "", table(header, rows)]
    if found.saved:
        lines += ["", "Trained in full: " + ", ".join(sorted(found.saved))]
    counts = report["parameters"]
    lines += ["", f"{counts['total']:,} trained parameters in {len(rows)} layers"]
    if found.layers and all(layer.norm is None for layer in found.layers):
        lines.append(
            "The drift of the magnitudes is not known: the folder does not hold its base's norms."
        )
    return "\n".join(lines)
