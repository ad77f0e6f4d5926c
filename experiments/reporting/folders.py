"""Reads run folders (`experiments/trainer/run_folder.py`), and says which parts are missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ReportError(ValueError):
    """There is nothing to report, or a file of a run folder is damaged. The message names it."""


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
    files = [folder / "run.json" for folder in folders]
    starts = [start for file in files if file.exists() for start in read_json(file)]
    return list(dict.fromkeys(start["command"] for start in starts))
