"""Metrics of a run, written as JSON lines and as TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsError(ValueError):
    """A metrics file is malformed, or a metric is not a number."""


class MetricsWriter(contextlib.AbstractContextManager):
    r"""Writes metrics to `folder/metrics.jsonl` and to TensorBoard event files in `folder`.

    Every line of `metrics.jsonl` is an object with `step` (int), `split` (str) and the metrics.
    When `write` returns, the line is in the file. JSON has no NaN or infinity: both are written as
    null, with one warning per metric. The event files hold the value itself.

    Args:
        folder: Where to write. It is made if it does not exist.
        resume_step: The first step that a resumed run writes. Lines of this step and of later ones
            are removed, and earlier lines are kept. None starts a new run.

    Raises:
        FileExistsError: A new run in a folder that already has metrics.
        MetricsError: The file of a resumed run has a malformed line. An unfinished last line, which
            an interruption can leave, is no error and is removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with MetricsWriter(folder) as writer:
        ...         writer.write(10, "train", {"loss": np.float32(0.5)})
        ...     (Path(folder) / "metrics.jsonl").read_text()
        '{"step": 10, "split": "train", "loss": 0.5}\n'
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS_FILE
        if resume_step is not None:
            _drop_from(path, resume_step)
        elif path.exists() and path.stat().st_size:
            raise FileExistsError(
                f"{path} has the metrics of an earlier run: choose another folder, delete it, or "
                "resume that run (resume_step=...)"
            )
        self._stream = path.open("a", encoding="utf-8")
        # purge_step makes TensorBoard hide older values of this step and of later ones. The
        # suffix gives two runs that start in the same second different files.
        self._tensorboard = SummaryWriter(
            os.fspath(self._folder), purge_step=resume_step, filename_suffix=f".{time.time_ns()}"
        )
        self._warned: set[str] = set()

    def write(self, step: SupportsIndex, split: str, values: Mapping[str, Any]) -> None:
        """Writes the metrics of one step.

        Args:
            step: Number of optimiser steps taken: a Python, NumPy or JAX integer.
            split: The data of the metrics: "train", "validation", "test" and so on.
            values: Scalars by name: Python, NumPy or JAX numbers of any dtype.

        Raises:
            MetricsError: A value is not one number, or a metric is named `step` or `split`.
        """
        numbers = {name: _number(name, value) for name, value in values.items()}
        step = operator.index(step)
        line: dict[str, Any] = {"step": step, "split": split}
        if clash := line.keys() & numbers.keys():
            raise MetricsError(f"{sorted(clash)} cannot be names of metrics: every line has them")
        for name, number in numbers.items():
            line[name] = number if math.isfinite(number) else None
            if line[name] is None and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{split} {name} is {number} at step {step}: null in {METRICS_FILE} "
                    "(noted once per metric)",
                    stacklevel=2,
                )
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()
        for name, number in numbers.items():
            self._tensorboard.add_scalar(f"{split}/{name}", number, step)

    def close(self) -> None:
        """Closes both files. Nothing can be written afterwards."""
        self._stream.close()
        self._tensorboard.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of `folder/metrics.jsonl`, in order, without an unfinished last line.

    Raises:
        FileNotFoundError: The folder has no metrics.
        MetricsError: A line is malformed. The message has its number.
    """
    path = Path(folder) / METRICS_FILE
    # If a process is killed while it writes, the last line has no end.
    *complete, _ = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or not isinstance(line["split"], str):
                raise TypeError("step must be an integer and split a string")
        except (ValueError, LookupError, TypeError) as error:
            raise MetricsError(
                f"{path}, line {number}: not an object with step and split ({error!r})"
            ) from error
        lines.append(line)
    return lines


def interval_95(accuracy: float, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of an accuracy on `n` independent examples.

    Unlike accuracy +- 1.96 standard errors, it stays within [0, 1] and holds near both ends.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22 (1927), 209-212.

    Raises:
        ValueError: `accuracy` is outside [0, 1], or `n` is below 1.

    Example:
        >>> low, high = interval_95(0.87, 2000)
        >>> f"{low:.3f} to {high:.3f}"
        '0.855 to 0.884'
    """
    if not 0 <= accuracy <= 1 or n < 1:
        raise ValueError(f"need 0 <= accuracy <= 1 and n >= 1, got {accuracy} and {n}")
    z = statistics.NormalDist().inv_cdf(0.975)
    centre = accuracy + z**2 / (2 * n)
    spread = z * math.sqrt(accuracy * (1 - accuracy) / n + (z / (2 * n)) ** 2)
    scale = 1 + z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1:
        raise MetricsError(f"metric {name!r} must be one number, got shape {array.shape}")
    number = array.item()
    if not isinstance(number, int | float):
        raise MetricsError(f"metric {name!r} must be a number, got {value!r}")
    return number if isinstance(number, float) else int(number)  # bool as well


def _drop_from(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] < step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
