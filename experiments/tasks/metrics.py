"""Metrics of a run: JSON lines for programs, TensorBoard event files for people."""

from __future__ import annotations

import json
import math
import operator
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import numpy as np
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsError(ValueError):
    """A metrics file or a metric that cannot be used as it is."""


class MetricsWriter:
    r"""Writes metrics to `folder/metrics.jsonl` and to TensorBoard event files in `folder`.

    Every line of `metrics.jsonl` is an object with `step` (int), `split` (str) and the metrics, and
    survives the end of the process once `write` has returned. JSON has no NaN or infinity: both are
    written as null, with one warning per metric; the event files hold the value itself.

    Args:
        folder: Where to write; made if it does not exist.
        resume_step: The first step that will be written again after an interruption. Lines of this
            and later steps are dropped, earlier ones kept. None: a new run.

    Raises:
        FileExistsError: A new run in a folder that already has metrics.
        MetricsError: Resuming from a file with a malformed line. (An unfinished last line, as an
            interruption leaves it, is dropped.)

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
        # purge_step makes TensorBoard hide what it has of this and later steps. The suffix keeps
        # two runs that start in the same second from writing to the same file.
        self._tensorboard = SummaryWriter(
            os.fspath(self._folder), purge_step=resume_step, filename_suffix=f".{time.time_ns()}"
        )
        self._warned: set[str] = set()

    def write(self, step: SupportsIndex, split: str, values: Mapping[str, Any]) -> None:
        """Writes the metrics of one step.

        Args:
            step: Number of optimiser steps taken: a Python, NumPy or JAX integer.
            split: What was measured: "train", "validation", "test", ...
            values: Scalars by name: Python, NumPy or JAX numbers of any dtype.

        Raises:
            MetricsError: A value that is not one number, or a name that is taken.
        """
        numbers = {name: _number(name, value) for name, value in values.items()}
        step = operator.index(step)
        line: dict[str, Any] = {"step": step, "split": split}
        if clash := line.keys() & numbers.keys():
            raise MetricsError(f"{sorted(clash)} cannot be metrics' names: every line has them")
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
        """Closes both files; nothing can be written afterwards."""
        self._stream.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, in order; an unfinished last line is left out.

    Raises:
        FileNotFoundError: The folder has no metrics.
        MetricsError: A malformed line, named by its number.
    """
    path = Path(folder) / METRICS_FILE
    # A process killed while writing leaves a last line without its end.
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
    """95 % Wilson score interval of an accuracy measured on `n` independent examples.

    Unlike accuracy +- 1.96 standard errors, it stays within [0, 1] and is right near both ends.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22 (1927), 209-212.

    Raises:
        ValueError: accuracy outside [0, 1], or n below 1.

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
    return number if isinstance(number, float) else int(number)  # bool, too


def _drop_from(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] < step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
