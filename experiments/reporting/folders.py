"""Reads run folders (`experiments/trainer/run_folder.py`), and says which parts are missing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Shaped

_PARTS = ("config.json", "summary.json", "run.json", "test.json", "metrics.jsonl")
_NEEDED = ("experiment", "task", "model", "method", "rank", "learning_rate", "seed")
_PREDICTIONS = "test_predictions.npz"


class ReportError(ValueError):
    """There is nothing to report, or a file of a run folder is damaged. The message names it."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """One finished run, as its folder holds it.

    Attributes:
        folder: The folder.
        config: Everything that the result depends on.
        summary: The validation metrics, the costs.
        test: The test metrics; None if the test split was not touched.
        commands: How it was made; more than one if it was interrupted.
        revision: The git revision of its last start, if known.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    test: dict[str, Any] | None
    commands: tuple[str, ...]
    revision: str | None

    @property
    def metric(self) -> str:
        """The metric that selects; higher is better."""
        return str(self.summary["metric"])

    def validation(self, metric: str | None = None) -> float:
        """Returns a metric on the validation split; NaN if it is not a number."""
        return _number(self.summary["validation"].get(metric or self.metric))

    def test_score(self, metric: str | None = None) -> float:
        """Returns a metric on the test split; NaN if there is none."""
        return _number((self.test or {}).get(metric or self.metric))

    def predictions(self) -> dict[str, Shaped[np.ndarray, " example"]] | None:
        """Returns the predictions on the test split and the labels; None if they were not kept.

        Raises:
            ReportError: The file is damaged.
        """
        file = self.folder / _PREDICTIONS
        if not file.exists():
            return None
        try:
            with np.load(file) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except (ValueError, OSError, EOFError) as error:
            raise ReportError(f"{file} is damaged ({error})") from error
        return found if {"predictions", "labels"} <= found.keys() else None


@dataclasses.dataclass(frozen=True)
class Runs:
    """The finished runs of some folders, and a line for everything that is missing."""

    runs: tuple[FinishedRun, ...]
    problems: tuple[str, ...]


def read_runs(folders: Iterable[Path]) -> Runs:
    """Reads all runs in folders, however deep. A run with a missing part is left out, and named.

    Raises:
        ReportError: A folder does not exist, or no finished run was found.
    """
    runs: list[FinishedRun] = []
    problems: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder} is no folder: give run folders")
        for path in _run_folders(folder):
            try:
                runs.append(_read_run(path))
            except ReportError as error:
                problems.append(str(error))
    if not runs:
        raise ReportError("\n".join(["there is no finished run to report", *problems]))
    return Runs(tuple(runs), tuple(problems))


def read_json(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ReportError: It is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{file} is missing") from None
    except (ValueError, OSError) as error:
        raise ReportError(
            f"{file} is damaged ({error}): delete the run's folder and run it again"
        ) from error


def commands(folders: Sequence[Path]) -> list[str]:
    """Returns the different commands that made runs, in order; a run without `run.json` has none.

    Raises:
        ReportError: A file is damaged.
    """
    starts = [start for folder in folders for start in _starts(folder)]
    return list(dict.fromkeys(start["command"] for start in starts))


def _run_folders(folder: Path) -> list[Path]:
    """Returns the folders that hold a run, or what is left of one."""
    found = []
    for path, below, files in os.walk(folder):
        below.sort()
        if not {"config.json", "summary.json", "metrics.jsonl"}.isdisjoint(files):
            found.append(Path(path))
            below.clear()  # checkpoints have files of these names
    return found


def _read_run(folder: Path) -> FinishedRun:
    if not (folder / "config.json").exists():
        found = [name for name in _PARTS if (folder / name).exists()]
        raise ReportError(
            f"{folder} has no config.json (only {', '.join(found)}): not in the table"
        )
    config = read_json(folder / "config.json")
    lacks = (
        [name for name in _NEEDED if name not in config] if isinstance(config, dict) else _NEEDED
    )
    if lacks:
        raise ReportError(f"{folder}/config.json has no {', '.join(lacks)}: not in the table")
    if not (folder / "summary.json").exists():
        raise ReportError(f"{folder} has no summary.json, it did not finish: not in the table")
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or not {"validation", "metric"} <= summary.keys():
        raise ReportError(f"{folder}/summary.json has no validation and metric: not in the table")
    test = folder / "test.json"
    starts = _starts(folder)
    return FinishedRun(
        folder,
        config,
        summary,
        read_json(test) if test.exists() else None,
        tuple(dict.fromkeys(start["command"] for start in starts)),
        starts[-1].get("git") if starts else None,
    )


def _starts(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run.json"
    return read_json(file) if file.exists() else []


def _number(x: Any) -> float:
    return float(x) if isinstance(x, int | float) else float("nan")
