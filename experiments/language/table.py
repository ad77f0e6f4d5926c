"""The table of a comparison, from its run folders alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.trainer.methods import METHODS

_TITLES = {"base": "not fine-tuned", **{name: method.title for name, method in METHODS.items()}}


def table(folder: Path, titles: Mapping[str, str]) -> str:
    """Returns the test accuracies by method and task, in percent, as Markdown.

    One row for each method, rank and learning rate that was tested: the mean over seeds, and the
    standard deviation of the average.

    Args:
        folder: That holds the run folders.
        titles: Of the tasks, in the order of the columns.
    """
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/test.json")):
        found = {name: _read(path.with_name(f"{name}.json")) for name in ("config", "summary")}
        config = found["config"]
        key = config["method"], config["rank"], config["learning_rate"]
        groups.setdefault(key, []).append({**found, "test": _read(path)})
    if not groups:
        return "No run was tested yet."
    runs = [run for group in groups.values() for run in group]
    tasks = {task: title for task, title in titles.items() if f"{task}/accuracy" in runs[0]["test"]}
    # `accuracy` chooses by nats a token, where answers are compared by their likelihood.
    metrics = [m for m in ("accuracy", "accuracy_sum") if m in runs[0]["test"]]
    tables = ["\n".join(_lines(groups, tasks, metric)) for metric in metrics]
    if len(tables) == 2:
        tables.insert(1, "By the likelihood of the whole answer, not by token:")
    return "\n\n".join(tables)


def _lines(
    groups: dict[tuple[str, int, float], list[dict[str, Any]]],
    tasks: Mapping[str, str],
    metric: str,
) -> list[str]:
    heads = [
        "method",
        "rate",
        "seeds",
        *tasks.values(),
        "average",
        "forgetting",
        "parameters",
        "s/step",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (method, rank, rate), group in sorted(groups.items(), key=lambda item: item[0][1:]):
        tests = [run["test"] for run in group]
        cells = [f"{100 * _mean(test[f'{t}/{metric}'] for test in tests):.1f}" for t in tasks]
        average = [100 * test[metric] for test in tests]
        spread = f" ± {statistics.stdev(average):.1f}" if len(average) > 1 else ""
        summaries = [run["summary"] for run in group]
        cells.append(f"{_mean(average):.1f}{spread}")
        cells.append(_known([s["forgetting"] for s in summaries], "{:+.3f}"))
        cells.append(f"{summaries[0]['trainable_parameters']:,}")
        cells.append(_known([s["seconds_per_step"] for s in summaries], "{:.2f}"))
        title = _TITLES.get(method, method) + (f" r{rank}" if rank else "")
        first = [title, f"{rate:g}" if rate else "", str(len(group))]
        lines.append(f"| {' | '.join([*first, *cells])} |")
    return lines


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _known(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(_mean(known)) if known else ""


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
