"""Locks on folders, so that readers and writers wait for each other.

They are advisory, on the folder itself, and the system frees them when a process ends.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from dora_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system: without locks, leftovers stay
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

# A writer waits so long for those who read the old version, a reader for one who replaces it. Both
# then go on: the reader notices that the folder is another one, and reads that.
_PATIENCE_SECONDS = 2.0
_ATTEMPTS = 20


def read_in_one_piece(folder: pathlib.Path, read: Callable[[], T]) -> T:
    """Returns what a function reads from a folder that others may replace: all of one version.

    Raises:
      CheckpointError: the folder was replaced again and again.
    """
    for _ in range(_ATTEMPTS):
        with opened(folder, exclusive=False) as descriptor:
            try:
                result = read()
            except (ValueError, OSError):
                if is_still(folder, descriptor):
                    raise
            else:
                if is_still(folder, descriptor):
                    return result
    raise CheckpointError(
        f"{folder} was replaced {_ATTEMPTS} times while it was read: read it anew"
    )


@contextlib.contextmanager
def unchanged(folder: pathlib.Path) -> Iterator[None]:
    """Has others wait with replacing a folder while the block reads it.

    Raises:
      CheckpointError: they did not wait.
    """
    with opened(folder, exclusive=False) as descriptor:
        yield
        if not is_still(folder, descriptor):
            raise CheckpointError(f"{folder} was replaced while it was read: start anew")


@contextlib.contextmanager
def opened(folder: pathlib.Path, *, exclusive: bool, in_place: bool = True) -> Iterator[int | None]:
    """Yields the descriptor of a folder, locked; None where folders cannot be opened.

    Args:
      folder: to open.
      exclusive: whether none else may hold the lock, as for writing.
      in_place: whether to open it anew if another folder took its place before it was locked.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    descriptor = None
    try:
        while True:
            try:
                descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
            except (OSError, ValueError):  # ValueError: a name with a NUL in it
                if in_place and is_being_replaced(folder) and time.monotonic() < deadline:
                    time.sleep(0.0003)
                    continue
                break
            locked(descriptor, exclusive=exclusive, patience=deadline - time.monotonic())
            if not in_place or is_still(folder, descriptor) or time.monotonic() > deadline:
                break
            os.close(descriptor)
            descriptor = None
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def locked(descriptor: int, *, exclusive: bool, patience: float) -> bool:
    """Locks a folder; returns whether that was possible in so many seconds."""
    if fcntl is None:
        return False
    kind, deadline = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.0003)  # a reader that reads again and again leaves a short gap
        except OSError:  # a file system without locks
            return False


def is_being_replaced(folder: pathlib.Path) -> bool:
    """Whether a folder is not there because it is just replaced, by two renames."""
    try:
        folder = pathlib.Path(os.path.realpath(folder))
        return any(folder.parent.glob(f".{glob.escape(folder.name)}.*.partial/old"))
    except (OSError, ValueError):  # a name that no folder can have
        return False


def is_still(folder: pathlib.Path, descriptor: int | None) -> bool:
    """Whether a path leads to the folder that was opened. An open one keeps its number."""
    if descriptor is None:  # there was none to open, or the system opens none
        return fcntl is None or not os.path.isdir(folder)
    try:
        there = os.stat(folder)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
