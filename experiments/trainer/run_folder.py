"""The folder of a run, which is the same for every experiment.

    config.json       the settings that the results depend on
    run.json          how it was made: command, git revision, versions, devices; one entry a start
    metrics.jsonl     metrics by step; the same for TensorBoard in events.*
    checkpoints/      of an unfinished run, to resume from
    summary.json      the results; only a finished run has it

One run writes into it at a time, and its files are whole. Of a run of several processes the first
one writes. Reports are made from such folders alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import jax

_PACKAGES = ("dora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other runs out of it. A kill frees it.

    Raises:
        SystemExit: Another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() > 0:  # of a run whose first process has the lock
        yield
        return
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


def start_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `config.json` and `run.json` of a run that starts, or goes on, in a folder.

    Args:
        folder: It exists.
        settings: Everything that the results depend on, as JSON.

    Raises:
        SystemExit: The folder holds a run of other settings.
    """
    file = folder / "config.json"
    if file.exists() and _read(file) != json.loads(json.dumps(settings)):
        raise SystemExit(
            f"{folder} holds a run with other settings (see {file}): "
            "choose another --run-folder, or run with those"
        )
    _write(file, settings)
    starts = _read(folder / "run.json") if (folder / "run.json").exists() else []
    _write(folder / "run.json", [*starts, provenance()])


def finish_run(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`, which ends a run."""
    _write(folder / "summary.json", summary)


def finished_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the summary of a finished run, or None if it has not finished.

    Raises:
        SystemExit: The folder holds a finished run of other settings.
    """
    if not (folder / "summary.json").exists():
        return None
    if _read(folder / "config.json") != json.loads(json.dumps(settings)):
        raise SystemExit(f"{folder} holds a run of other settings: choose another --run-folder")
    return _read(folder / "summary.json")


def provenance() -> dict[str, Any]:
    """Returns how a result is made: command, time, git revision, versions, devices.

    The revision is None outside of a checkout. It ends in `+changes` if files differ from it.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _revision(),
        "versions": versions,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _revision() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    if jax.process_index() == 0:
        write_whole(file, json.dumps(content, indent=2) + "\n")
