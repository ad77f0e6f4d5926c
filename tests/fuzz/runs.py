"""Damages folders one after another, and sorts what comes of reading them."""

from __future__ import annotations

import contextlib
import logging
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dora_jax.errors import DoRAError
from experiments.models.config_file import ModelConfigError
from tests.fuzz.formats import FORMATS, Format, Values, whole
from tests.fuzz.mutations import mutate

OURS = (DoRAError, ModelConfigError)
SECONDS, MEGABYTES = 2.0, 100
BAD = ("silent", "raw", "slow", "large")


class Outcome(NamedTuple):
    """What came of one mutation.

    Attributes:
      number: of the mutation.
      kind: "same" or "as it says" (both right), "error" (one of ours), "silent" (a wrong result),
        "raw" (another library's error), "slow" (beyond 2 s) or "large" (beyond 100 MB).
      said: the format, the mutation, and the error.
    """

    number: int
    kind: str
    said: str


class Endless(BaseException):
    """Reading a folder does not end."""


def run(seed: int, count: int, only: int | None = None) -> Iterator[Outcome]:
    """Yields the outcomes of mutations that a seed draws; or of one of them alone."""
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wholes = []
        for i, kind in enumerate(FORMATS):
            folder = Path(temporary, f"whole-{i}")
            kind.make(folder)
            wholes.append((kind, folder, whole(kind, folder)))
        for number in range(count) if only is None else [only]:
            kind, folder, right = wholes[number % len(wholes)]
            copy = Path(temporary, "copy")
            shutil.copytree(folder, copy)
            said = mutate(copy, random.Random(f"{seed} {number}"))
            verdict, error = judge(kind, copy, right)
            yield Outcome(number, verdict, f"{kind.name}: {said}: {error}")
            shutil.rmtree(copy)


def judge(kind: Format, folder: Path, right: Values) -> tuple[str, str]:
    """Returns the kind of the outcome of reading a damaged folder, and the error."""
    verdict, error, seconds, megabytes = _read(kind, folder, right)
    if seconds > SECONDS:  # once more: the machine may have been busy
        verdict, error, seconds, megabytes = _read(kind, folder, right)
    if seconds > SECONDS:
        return "slow", f"{seconds:.1f} s, {error}"
    if megabytes > MEGABYTES:
        return "large", f"{megabytes} MB, {error}"
    return verdict, error


def _read(kind: Format, folder: Path, right: Values) -> tuple[str, str, float, int]:
    before, start = _peak(), time.perf_counter()
    verdict, error, values = "", "", {}
    try:
        with _time_limit(5):
            values = kind.read(folder)
    except OURS as raised:
        verdict, error = "error", f"{type(raised).__name__}: {raised}"
    except (Exception, Endless) as raised:
        verdict, error = "raw", f"{type(raised).__name__}: {raised}"
    seconds, megabytes = time.perf_counter() - start, _peak() - before
    if not verdict:
        verdict, error = _verdict(kind, folder, values, right)
    return verdict, error, seconds, megabytes


def _verdict(kind: Format, folder: Path, values: Values, right: Values) -> tuple[str, str]:
    if not (wrong := differences(values, right)):
        return "same", ""
    if kind.independent is None:
        return "silent", f"other {wrong[:3]}"
    try:
        stated = kind.independent(folder)
    except Exception as error:
        return "silent", f"other {wrong[:3]}; another reader: {type(error).__name__}: {error}"
    wrong = differences(values, stated)
    return ("silent", f"not what the files say: {wrong[:3]}") if wrong else ("as it says", "")


def differences(one: Values, other: Values) -> list[str]:
    """Returns the names of the values that differ."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not _equal(one[name], other[name])
    )


def _equal(one: Any, other: Any) -> bool:
    if hasattr(one, "shape") or hasattr(other, "shape"):
        # Kept in float32 by both; stored in any dtype.
        a, b = (np.asarray(x, np.float32) for x in (one, other))
        return a.shape == b.shape and np.array_equal(a, b)
    return bool(one == other)


def _peak() -> int:
    """Returns the most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    # Again each second: Python ignores what is raised while it collects garbage.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(outcomes: Counter[tuple[str, str]]) -> str:
    """Returns the counts as lines of text: a row for each format."""
    kinds = ("same", "as it says", "error", *BAD)
    rows = [["format", *kinds]]
    for name in dict.fromkeys(name for name, _ in outcomes):
        rows.append([name, *(str(outcomes[name, kind]) for kind in kinds)])
    rows.append(["all", *(str(sum(outcomes[r[0], kind] for r in rows[1:])) for kind in kinds)])
    return "\n".join(" ".join(cell.rjust(14) for cell in row) for row in rows)
