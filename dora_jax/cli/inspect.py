"""`dora-jax inspect`: what an adapter folder holds."""

from __future__ import annotations

import pathlib
from typing import Any

from dora_jax.cli.folders import AdapterFolder, LayerAdapter, read_folder
from dora_jax.cli.tables import number, percent, size, table


def inspect(folder: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns what a folder holds, as JSON types and as text."""
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
            "The drift of the magnitudes is not known: the folder has no norms of its base."
        )
    return "\n".join(lines)
