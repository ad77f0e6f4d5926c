"""`dora-jax diff`: the differences between two adapters of one format."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dora_jax.cli.folders import AdapterFolder, LayerAdapter, norm_of, read_folder
from dora_jax.cli.inspect import number, percent, table
from dora_jax.errors import AdapterError

# Fields of a configuration that do not change what a trained adapter computes.
_WITHOUT_EFFECT = {
    *("dropout", "norm_gradient", "init", "target_modules", "exclude_modules", "adapter_dtype"),
    *("lora_dropout", "base_model_name_or_path", "task_type", "inference_mode"),
}


def diff(one: pathlib.Path, other: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns the differences between two adapters, as JSON types and as text.

    Raises:
      AdapterError: they are in different formats.
    """
    a, b = read_folder(one), read_folder(other)
    if a.format != b.format:
        raise AdapterError(
            f"{one} is in the format {a.format} and {other} in {b.format}: convert one of them "
            "first (dora-jax convert)"
        )
    layers = _compare_layers(a, b)
    fields = {
        name: [a.config.get(name), b.config.get(name)]
        for name in sorted({*a.config, *b.config})
        if a.config.get(name) != b.config.get(name)
    }
    names = sorted({*a.saved, *b.saved})
    saved = {name: _change(a.saved.get(name), b.saved.get(name)) for name in names}
    in_first, in_second = _only(a, b), _only(b, a)
    equal = (
        all(row["equal"] for row in layers)
        and all(change == 0 for change in saved.values())
        and not (in_first or in_second or fields.keys() - _WITHOUT_EFFECT)
    )
    report = {
        "equal": equal,
        "only_in_first": in_first,
        "only_in_second": in_second,
        "config": fields,
        "layers": layers,
        "saved": saved,
    }
    return report, _text(report)


def _compare_layers(one: AdapterFolder, other: AdapterFolder) -> list[dict[str, Any]]:
    others = {layer.path: layer for layer in other.layers}
    return [_row(layer, others[layer.path]) for layer in one.layers if layer.path in others]


def _row(one: LayerAdapter, other: LayerAdapter) -> dict[str, Any]:
    same = (
        one.scaling == other.scaling
        and one.arrays.keys() == other.arrays.keys()
        and all(
            x.shape == other.arrays[k].shape and np.array_equal(x, other.arrays[k])
            for k, x in one.arrays.items()
        )
        and _same_product(one, other)
    )
    return {
        "path": one.path,
        "equal": same,
        "rank": [one.rank, other.rank],
        "scaling": [one.scaling, other.scaling],
        "direction": 0.0 if same else _direction(one, other),
        "magnitude": _change(one.magnitude, other.magnitude),
        "magnitude_max": _largest(one.magnitude, other.magnitude),
    }


def _same_product(one: LayerAdapter, other: LayerAdapter) -> bool:
    """Whether the factors of the change are equal: those trained, and those they started from."""
    pairs = ((one.a, other.a), (one.b, other.b))
    return all(
        x is y or (x is not None and y is not None and np.array_equal(x, y)) for x, y in pairs
    )


def _direction(one: LayerAdapter, other: LayerAdapter) -> float | None:
    """Returns `||s A B - s' A' B'||` over the larger of the two norms."""
    if one.a is None or one.b is None or other.a is None or other.b is None:
        return None
    if one.a.shape[:2] != other.a.shape[:2] or one.b.shape[2] != other.b.shape[2]:
        return None
    a = np.concatenate([one.a, other.a], axis=2)
    b = np.concatenate([one.scaling * one.b, -other.scaling * other.b], axis=1)
    largest = max(one.product_norm() or 0.0, other.product_norm() or 0.0)
    return norm_of(a, b) / largest if largest else 0.0


def _change(one: Any, other: Any) -> float | None:
    """Returns `||x - y||` over the larger norm; None if one is missing or their shapes differ."""
    if one is None or other is None or np.shape(one) != np.shape(other):
        return None
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    largest = max(np.linalg.norm(x), np.linalg.norm(y))
    return float(np.linalg.norm(x - y) / largest) if largest else 0.0


def _largest(one: Any, other: Any) -> float | None:
    """Returns the largest `|x - y| / max(|x|, |y|)` of two magnitudes."""
    if one is None or other is None or np.shape(one) != np.shape(other):
        return None
    scale = np.maximum(np.abs(one), np.abs(other))
    return float(np.max(np.abs(one - other) / np.where(scale == 0, 1, scale), initial=0.0))


def _only(one: AdapterFolder, other: AdapterFolder) -> list[str]:
    names = {layer.path for layer in one.layers} | set(one.saved)
    return sorted(names - {layer.path for layer in other.layers} - set(other.saved))


def _text(report: Mapping[str, Any]) -> str:
    if report["equal"]:
        return f"The same: {len(report['layers'])} layers, {len(report['saved'])} other arrays."
    header = ("layer", "direction", "magnitude", "largest")
    rows = [
        (row["path"] or "(root)", number(row["direction"]), *_percents(row))
        for row in report["layers"]
    ]
    rows += [(name, number(change), "", "") for name, change in report["saved"].items()]
    lines = [f"{name}: {a} | {b}" for name, (a, b) in report["config"].items()]
    lines += [f"only in the first: {name}" for name in report["only_in_first"]]
    lines += [f"only in the second: {name}" for name in report["only_in_second"]]
    return "\n".join([*lines, *([""] if lines else []), table(header, rows)])


def _percents(row: Mapping[str, Any]) -> tuple[str, str]:
    return percent(row["magnitude"]), percent(row["magnitude_max"])
