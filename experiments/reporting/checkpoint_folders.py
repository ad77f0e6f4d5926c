"""What did this fine-tune do? Two Hugging Face checkpoint folders, compared tensor by tensor."""

from __future__ import annotations

import collections
import csv
import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import dora_jax as dora
from dora_jax import huggingface
from dora_jax.analysis import change_rank
from experiments.reporting import style
from experiments.reporting.folders import ReportError
from experiments.reporting.statistics import correlation
from experiments.reporting.tables import Column, Table

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST_RANK = 2048
"""Kernels whose smaller side is larger have no ranks: singular values would take over a minute."""

_OUT_IN = dora.decomposition.KernelAxes((), (1,), (0,))
_IN_OUT = dora.decomposition.KernelAxes((), (0,), (1,))
# GPT-2's Conv1D holds its weights as (in, out).
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
# Tables are looked up, and a row of them is no output feature.
_TABLE = re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)\b")


@dataclasses.dataclass(frozen=True)
class TensorChange:
    """The change of one tensor.

    Attributes:
        name: In the first folder.
        shape: As stored.
        relative_norm: `||after - before|| / ||before||`; NaN if the tensor was zero.
        magnitude, relative_magnitude, direction: Of a kernel, see `dora.weight_change`.
        effective_rank, stable_rank: Of a kernel that is not too large, see `change_rank`.
    """

    name: str
    shape: tuple[int, ...]
    relative_norm: float
    magnitude: float = math.nan
    relative_magnitude: float = math.nan
    direction: float = math.nan
    effective_rank: float = math.nan
    stable_rank: float = math.nan

    @property
    def kind(self) -> str:
        """The name without the number of the layer, and without `.weight`."""
        return re.sub(r"\.\d+\.", ".*.", self.name).removesuffix(".weight")

    @property
    def is_kernel(self) -> bool:
        """Whether magnitudes and directions were measured."""
        return not math.isnan(self.direction)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The changes of all tensors that both folders have, and what could not be compared."""

    changes: list[TensorChange]
    problems: list[str]


def same_names(before: Iterable[str], after: Iterable[str]) -> dict[str, str]:
    """Returns for each tensor of the first folder its name in the second, where there is one.

    A model with a head has a prefix before the names of its base, such as `bert.` or `model.`: the
    prefix that most names differ by is put before or taken away.

    Example:
        >>> same_names(["layer.0.weight", "x"], ["bert.layer.0.weight", "head.weight", "x"])
        {'layer.0.weight': 'bert.layer.0.weight', 'x': 'x'}
    """
    ones, others = set(before), set(after)
    found = {name: name for name in ones & others}
    ones, others = ones - others, others - ones
    prefixes = collections.Counter(_prefixes(ones, others))
    prefixes.update(
        {f"-{prefix}": n for prefix, n in collections.Counter(_prefixes(others, ones)).items()}
    )
    if prefixes:
        prefix, _ = prefixes.most_common(1)[0]
        for name in ones:
            other = name.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + name
            if other in others and other != name:
                found[name] = other
    return dict(sorted(found.items()))


def _prefixes(short: set[str], long: set[str]) -> Iterable[str]:
    """Yields what stands before a dotted name of one set in the other one."""
    for name in long:
        parts = name.split(".")
        for i in range(1, min(4, len(parts))):
            if ".".join(parts[i:]) in short:
                yield ".".join(parts[:i]) + "."


def compare(before: Path, after: Path) -> Comparison:
    """Compares two checkpoint folders. Two tensors are in memory at one time.

    Raises:
        CheckpointError: A folder has no safetensors, or they are damaged.
        ReportError: The folders have no tensor in common.
    """
    one, other = (huggingface.open_folder(folder) for folder in (before, after))
    names = same_names(one.tensors, other.tensors)
    if not names:
        raise ReportError(f"{before} and {after} have no tensor in common: other architectures?")
    problems = [*one.problems, *other.problems]
    problems += [f"only in {before}: {name}" for name in sorted(one.tensors.keys() - names.keys())]
    only = other.tensors.keys() - set(names.values())
    problems += [f"only in {after}: {name}" for name in sorted(only)]
    changes = []
    for name, new in tqdm(names.items(), desc="tensors", unit="tensor", mininterval=1):
        a, b = one.tensors[name], other.tensors[new]
        if a.shape != b.shape:
            problems.append(f"{name}: {a.shape} before, {b.shape} after")
        elif not (_is_float(a.dtype) and _is_float(b.dtype)):
            problems.append(f"{name}: {a.dtype} before, {b.dtype} after, not compared")
        else:
            changes.append(_change(name, *(x.read().astype(np.float32) for x in (a, b))))
    return Comparison(changes, problems)


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def _change(
    name: str, before: Float[np.ndarray, "..."], after: Float[np.ndarray, "..."]
) -> TensorChange:
    size = float(np.linalg.norm(before.ravel()))
    moved = float(np.linalg.norm((after - before).ravel()))
    relative = moved / size if size else math.nan
    if before.ndim != 2 or not name.endswith("weight") or _TABLE.search(name):
        return TensorChange(name, before.shape, relative)
    axes = _IN_OUT if _CONV1D.search(name) else _OUT_IN
    old, new = jnp.asarray(before), jnp.asarray(after)
    fields = {k: float(x) for k, x in dora.weight_change(old, new, axes)._asdict().items()}
    if min(before.shape) <= LARGEST_RANK:
        rank = change_rank(old, new, axes)
        fields |= {"effective_rank": float(rank.effective), "stable_rank": float(rank.stable)}
    return TensorChange(name, before.shape, relative, **fields)


def table_of(changes: Iterable[TensorChange]) -> Table:
    """Returns the means over the layers of each kind of tensor, those that moved most first."""
    kinds: dict[str, list[TensorChange]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change)

    def mean(of: list[TensorChange], field: str) -> float:
        values = np.array([getattr(change, field) for change in of])
        known = values[np.isfinite(values)]
        return float(known.mean()) if len(known) else math.nan

    rows = [
        (
            kind,
            len(of),
            100 * mean(of, "relative_norm"),
            100 * mean(of, "relative_magnitude"),
            1 - mean(of, "direction"),
            mean(of, "effective_rank"),
            mean(of, "stable_rank"),
        )
        for kind, of in sorted(kinds.items(), key=lambda item: -mean(item[1], "relative_norm"))
    ]
    columns = (
        Column("tensor"),
        Column("layers"),
        Column("‖W' − W‖ / ‖W‖ (%)", 2),
        Column("|dm| / m (%)", 2),
        Column("cos(before, after)", 4),
        Column("effective rank", 1),
        Column("stable rank", 1),
    )
    return Table(columns, tuple(rows), "Means over layers.")


def compare_folders(before: Path, after: Path, output: Path) -> str:
    """Compares two checkpoint folders, and writes fine_tune.md, .csv and .png into a folder.

    Returns:
        The Markdown.
    """
    found = compare(before, after)
    output.mkdir(parents=True, exist_ok=True)
    kernels = [change for change in found.changes if change.is_kernel and change.relative_norm]
    unchanged = sum(change.relative_norm == 0 for change in found.changes)
    lines = [
        f"# What changed from {before.name} to {after.name}",
        "",
        f"{len(found.changes)} tensors compared, {unchanged} of them are equal. "
        + _correlation(kernels),
        "",
        table_of(change for change in found.changes if change.relative_norm != 0).markdown(),
        "",
    ]
    if kernels:
        _plot(kernels, output / "fine_tune.png")
        lines += ["![magnitude and direction](fine_tune.png)", ""]
    if found.problems:
        lines += ["## Not compared", "", *(f"- {problem}" for problem in found.problems), ""]
    with (output / "fine_tune.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        names = [field.name for field in dataclasses.fields(TensorChange)]
        writer.writerow(names)
        for change in found.changes:
            writer.writerow(
                [
                    "x".join(map(str, change.shape)) if name == "shape" else getattr(change, name)
                    for name in names
                ]
            )
    text = "\n".join(lines)
    (output / "fine_tune.md").write_text(text, encoding="utf-8")
    return text


def _correlation(kernels: list[TensorChange]) -> str:
    x, y = (np.array([getattr(k, f) for k in kernels]) for f in ("direction", "relative_magnitude"))
    r = correlation(x, y, [kernel.name for kernel in kernels])
    if math.isnan(r.value):
        return "There are too few changed kernels for a correlation."
    return (
        f"Over {len(kernels)} changed kernels, corr(dD, |dm|/m) is {r.value:+.2f} "
        f"({r.low:+.2f} to {r.high:+.2f}, bootstrap over kernels)."
    )


def _plot(kernels: list[TensorChange], file: Path) -> None:
    changes: dict[str, Any] = {}
    for kernel in kernels:
        fields = (kernel.magnitude, kernel.relative_magnitude, kernel.direction)
        change = dora.analysis.WeightChange(*map(jnp.asarray, fields))
        changes.setdefault(kernel.kind, []).append(change)
    figure, panels = style.panels(1, 1, height=4.0)
    dora.analysis.plot_weight_change(changes, panels[0, 0], relative=True)
    style.finish(panels[0, 0])
    style.save(figure, file)
