"""What `experiments.decomposition` measures, and its report: dM and dD by layer and checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.reporting import published
from experiments.reporting.figures import plot_decomposition
from experiments.reporting.folders import ReportError, commands, read_json
from experiments.reporting.statistics import Interval, correlation, mean_interval
from experiments.reporting.tables import Cell, Column, Table
from experiments.trainer.methods import METHODS

if TYPE_CHECKING:
    pass

CHANGES = "changes.jsonl"
"""In a run folder: a line for each checkpoint and layer."""

_PAPERS_LAYERS = {"query", "value", "q_proj", "v_proj"}


@dataclasses.dataclass(frozen=True)
class Points:
    """The changes of several runs, one row for each run, checkpoint and layer.

    Attributes:
        rows: As `changes.jsonl` has them, with `method` and `seed`.
        configs: The settings of each run, by folder.
        commands: How the runs were made.
        problems: What is missing, a line each.
    """

    rows: list[dict[str, Any]]
    configs: dict[Path, dict[str, Any]]
    commands: list[str]
    problems: list[str]

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the runs."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    def of(self, method: str, keep: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
        """Returns the rows of a method that a condition keeps."""
        return [row for row in self.rows if row["method"] == method and keep(row)]


def read_points(folders: Sequence[Path]) -> Points:
    """Reads the changes of runs. A run that is not finished is listed as a problem.

    Raises:
        ReportError: There is no finished run.
    """
    rows: list[dict[str, Any]] = []
    configs: dict[Path, dict[str, Any]] = {}
    problems = []
    for folder in folders:
        if missing := [
            name
            for name in ("config.json", "summary.json", CHANGES)
            if not (folder / name).exists()
        ]:
            problems.append(f"{folder} has no {' and no '.join(missing)}: it is left out")
            continue
        configs[folder] = config = read_json(folder / "config.json")
        named = {"method": config["method"], "seed": config["seed"]}
        text = (folder / CHANGES).read_text(encoding="utf-8")
        rows += [json.loads(line) | named for line in text.splitlines()]
    if not rows:
        raise ReportError("\n".join(["no run has changes to report", *problems]))
    return Points(rows, configs, commands(list(configs)), problems)


def is_papers(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a projection that the paper looks at: q or v."""
    return row["layer"].rpartition(".")[2] in _PAPERS_LAYERS


def is_last(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the last checkpoint, which alone has ranks."""
    return "effective_rank" in row


def correlation_of(rows: Sequence[Mapping[str, Any]], field: str = "magnitude") -> Interval:
    """Returns the correlation of dD and a field, over layers; a layer's rows are one cluster."""
    x, y = (np.array([row[name] for row in rows]) for name in ("direction", field))
    return correlation(x, y, [row["layer"] for row in rows])


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> Interval:
    """Returns the mean correlation over seeds, taken on Fisher's scale so that it stays below 1."""
    most = 1 - 1e-12
    mean = by_seed(rows, lambda own: math.atanh(max(min(correlation_of(own).value, most), -most)))
    return Interval(*map(math.tanh, mean))


def by_seed(rows: Sequence[Mapping[str, Any]], value: Callable[[Any], float]) -> Interval:
    """Returns the mean over seeds of a figure of each seed's rows."""
    seeds = sorted({row["seed"] for row in rows})
    return mean_interval([value([row for row in rows if row["seed"] == seed]) for seed in seeds])


def correlations(points: Points) -> Table:
    """Returns the table of correlations, beside the paper's."""
    selections: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "q and v": is_papers,
        "all linear layers": lambda row: True,
        "q and v, last checkpoint": lambda row: is_papers(row) and is_last(row),
        "all linear layers, last checkpoint": is_last,
    }
    rows: list[tuple[Cell, ...]] = []
    for method in points.methods:
        for name, keep in selections.items():
            found = points.of(method, keep)
            if not found:
                continue
            pooled = correlation_of(found)
            title, expected = METHODS[method].title, published.CORRELATIONS.get(method)
            rows.append(
                (
                    title,
                    name,
                    len({row["layer"] for row in found}),
                    len({row["step"] for row in found}),
                    pooled,
                    over_seeds(found),
                    correlation_of(found, "relative_magnitude"),
                    expected if name == "q and v" else None,
                    verdict(pooled, expected),
                )
            )
    columns = (
        Column("method"),
        Column("kernels"),
        Column("layers"),
        Column("checkpoints"),
        Column("corr(dD, dM), interval over layers", 2, signed=True),
        Column("the same, interval over seeds", 2, signed=True),
        Column("corr(dD, |dm|/m)", 2, signed=True),
        Column("paper", 2, signed=True),
        Column("the paper's sign"),
    )
    caption = (
        "Each point is a layer at a checkpoint in a seed. The interval over layers draws whole "
        "layers anew, 2,000 times (a layer's points lie on one path); that over seeds is Student's "
        "t on Fisher's scale. A sign counts as found if the interval over layers excludes 0. The "
        f"paper's figures are of VL-BART ({published.PAPER}, section 3.2)."
    )
    return Table(columns, tuple(rows), caption).without_empty_columns()


def verdict(found: Interval, expected: float | None) -> str | None:
    """Returns whether the sign of a published correlation was found."""
    if expected is None:
        return None
    if found.sign == 0:
        return "undecided: the interval holds 0"
    return "reproduced" if found.sign == math.copysign(1, expected) else "refuted here"


def sizes(points: Points) -> Table:
    """Returns the table of how far the methods moved the kernels by the end."""

    def mean(field: str, factor: float = 1.0) -> Callable[[Any], float]:
        return lambda rows: factor * float(np.mean([row[field] for row in rows]))

    rows: list[tuple[Cell, ...]] = []
    for method in points.methods:
        found = points.of(method, is_last)
        if not found:
            continue
        configs = [c for c in points.configs.values() if c["method"] == method]
        rates = sorted({c["learning_rate"] for c in configs})
        cosine = by_seed(found, mean("direction"))
        rows.append(
            (
                METHODS[method].title,
                ", ".join(f"{rate:g}" for rate in rates),
                by_seed(found, mean("magnitude")),
                by_seed(found, mean("relative_magnitude", 100.0)),
                Interval(1 - cosine.value, 1 - cosine.high, 1 - cosine.low),
                by_seed(found, mean("relative_norm", 100.0)),
                by_seed(found, mean("effective_rank")),
                by_seed(found, mean("stable_rank")),
            )
        )
    columns = (
        Column("method"),
        Column("learning rate"),
        Column("dM", 4),
        Column("|dm| / m (%)", 2),
        Column("cos(before, after)", 4),
        Column("‖W' − W‖ / ‖W‖ (%)", 2),
        Column("effective rank", 1),
        Column("stable rank", 1),
    )
    caption = (
        "At the last step: means over all adapted linear layers, then over seeds (Student's t). "
        "The effective rank is the exponential of the entropy of the normalised singular values of "
        "W' − W (Roy and Vetterli, 2007); the stable rank is ‖W' − W‖² (Frobenius) over the "
        "largest squared singular value."
    )
    return Table(columns, tuple(rows), caption)


def write_report(points: Points, folder: Path) -> str:
    """Writes decomposition.md, .json, .png and the tables into a folder; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    signs, moved = correlations(points), sizes(points)
    signs.write(folder, "decomposition_correlations")
    moved.write(folder, "decomposition_sizes")
    plot_decomposition(_panels(points), folder / "decomposition.png")
    config = next(iter(points.configs.values()))
    text = "\n".join(
        [
            "# Magnitude and direction: what full fine-tuning, LoRA and DoRA changed",
            "",
            *(f"Made by `{command}`." for command in points.commands),
            "",
            f"{config['model']}, {config['task']}: {config['train_examples']} texts, "
            f"{config['epochs']} epoch(s) of batch {config['batch_size']}; rank {config['rank']}, "
            f"alpha {config['alpha']:g}, magnitude learning rate "
            f"{config['magnitude_lr_ratio']:g} x. Runs: {len(points.configs)}.",
            "",
            "## Correlation of the changes",
            "",
            signs.markdown(),
            "",
            "![changes of magnitude and direction](decomposition.png)",
            "",
            "## How far the kernels moved",
            "",
            moved.markdown(),
            *(["", "## Missing", "", *points.problems] if points.problems else []),
            "",
        ]
    )
    (folder / "decomposition.md").write_text(text, encoding="utf-8")
    figures = {
        "commands": points.commands,
        "runs": {str(path): config for path, config in points.configs.items()},
        "correlations": signs.records(),
        "sizes": moved.records(),
        "problems": points.problems,
    }
    (folder / "decomposition.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return text


def _panels(points: Points) -> dict[str, dict[str, Any]]:
    """Returns what the figure draws, by method and selection: points, and how far in training."""
    panels: dict[str, dict[str, Any]] = {}
    selections = {"q and v": is_papers, "all linear layers": lambda row: True}
    for method in points.methods:
        panels[method] = {}
        for name, keep in selections.items():
            if found := points.of(method, keep):
                last = max(row["step"] for row in found)
                columns = [(r["direction"], r["magnitude"], r["step"] / last) for r in found]
                panels[method][name] = (np.array(columns).T, correlation_of(found))
    return panels
