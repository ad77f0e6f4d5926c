"""The error of a full disk, whichever library reports it; what Orbax prints beside its errors."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dora_jax.errors import CheckpointError, DoRAError

# By the number of Python's errors, and as TensorStore and safetensors write it.
_FULL = {
    errno.ENOSPC: r"No space left on device|os error 28\b",
    errno.EDQUOT: r"Disk quota exceeded|os error 122\b",
    errno.EFBIG: r"File too large|os error 27\b",
}


def full_disk(target: pathlib.Path, error: BaseException) -> CheckpointError | None:
    """Returns the error to raise, in one line, if another one comes from a full disk; else None.

    Args:
      target: what was to be written.
      error: of any library.

    Example:
      >>> print(full_disk(pathlib.Path("/a"), OSError(errno.ENOSPC, "No space left on device")))
      /a cannot be written: No space left on device. Make room, or choose another disk
    """
    if isinstance(error, DoRAError):
        return None
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    for one in chain:
        for number, says in _FULL.items():
            given = getattr(one, "errno", None)
            if given == number or (given is None and re.search(says, str(one), re.IGNORECASE)):
                return CheckpointError(
                    f"{target} cannot be written: {os.strerror(number)}. Make room, or choose "
                    "another disk"
                )
    return None


class _Repeats(logging.Filter):
    """Drops what Orbax logs, with tracebacks of its threads, of errors that it raises as well.

    Attributes:
      dropped: whether there was any.
    """

    dropped = False

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        text = Exception(record.getMessage())
        repeats = any(e and full_disk(pathlib.Path(), e) for e in (error, text))
        self.dropped = self.dropped or repeats
        return not repeats


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Keeps Orbax, its threads and asyncio from repeating the error of a full disk.

    Once there was such an error it stays so: asyncio repeats it when its tasks are collected.
    """
    loggers, repeats = [logging.getLogger(name) for name in ("absl", "asyncio")], _Repeats()
    undo = ignore_late_threads()
    for logger in loggers:
        logger.addFilter(repeats)
    try:
        yield
    finally:
        if not repeats.dropped:
            for logger in loggers:
                logger.removeFilter(repeats)
            undo()


class _WithoutLateThreads:
    """A hook of `sys` without what threads report to an event loop that an error has ended."""

    def __init__(self, hook: Callable[..., object]) -> None:
        self.hook = hook

    def __call__(self, *what: Any) -> None:
        error = what[0].exc_value if len(what) == 1 else what[1]
        main = threading.current_thread() is threading.main_thread()
        if main or str(error) != "Event loop is closed":
            self.hook(*what)


def ignore_late_threads() -> Callable[[], None]:
    """Drops what threads of TensorStore print when Orbax has failed: they end after its event loop.

    Returns:
      What undoes it; not to be called after an error, since such a thread may come much later.
    """
    before = {name: getattr(sys, name) for name in ("excepthook", "unraisablehook")}
    for name, hook in before.items():
        if not isinstance(hook, _WithoutLateThreads):
            setattr(sys, name, _WithoutLateThreads(hook))

    def undo() -> None:
        for name, hook in before.items():
            if isinstance(getattr(sys, name), _WithoutLateThreads):
                setattr(sys, name, hook)

    return undo
