"""The folder of a run: one process writes into it at a time, and its files are whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes from running in it. A kill frees it.

    Raises:
        SystemExit: Another process runs in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SystemExit(
            f"another process is running in {folder}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_whole(file: Path, text: str) -> None:
    """Writes a text file, which has either its old content or the new one at any moment."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
