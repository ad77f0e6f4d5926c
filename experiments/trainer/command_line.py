"""Command lines of the experiments: their settings, and how they end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro

import dora_jax as dora
from dora_jax.disk import ignore_late_threads
from dora_jax.interrupts import InterruptError, raised
from experiments import end_at_once
from experiments.models.config_file import ModelConfigError
from experiments.reporting.folders import ReportError
from experiments.tasks.download import DownloadError
from experiments.tasks.metrics import MetricsError
from experiments.tasks.sarcasm import DatasetError
from experiments.trainer.finite import DivergedError
from experiments.trainer.mesh import MeshError
from experiments.trainer.settings import SettingsError

C = TypeVar("C")

# Errors that a user can correct: no network, a damaged file, a learning rate that is too high.
_EXPECTED = (
    dora.DoRAError,
    DatasetError,
    DivergedError,
    DownloadError,
    FloatingPointError,
    MeshError,
    MetricsError,
    ModelConfigError,
    ReportError,
    SettingsError,
)


def settings(kind: type[C], description: str | None, arguments: Sequence[str] | None = None) -> C:
    """Returns the settings that a command line gives.

    Args:
        kind: A dataclass, with a field for each option.
        description: The first lines of the help.
        arguments: The command line. The default is that of this process.

    Raises:
        SystemExit: An argument is empty, as an unset variable of a shell gives. An empty path would
            be the current folder.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not word.strip() or (equals and name.startswith("-") and not value.strip()):
            named = name.strip() or (words[i - 1] if i else "an argument")
            print(f"{named} is empty: is a variable unset?", file=sys.stderr)
            raise SystemExit(2)
    return tyro.cli(kind, description=description, args=words)


@contextlib.contextmanager
def in_one_line(message: str) -> Iterator[None]:
    """Ends the process with a message, and without a traceback, if it is interrupted or fails.

    Args:
        message: Tells how to continue.

    Raises:
        SystemExit: With status 130 after Ctrl-C, 143 after SIGTERM, and 1 where there is no
            network, no room on the disk, or where the training diverged.
    """
    ignore_late_threads()
    try:
        with raised(again=end_at_once):
            yield
    except InterruptError as interrupt:
        print(f"\n{str(interrupt).capitalize()}. {message}", file=sys.stderr)
        raise SystemExit(interrupt.status) from None
    except (*_EXPECTED, OSError) as error:
        raise SystemExit(str(error)) from None
