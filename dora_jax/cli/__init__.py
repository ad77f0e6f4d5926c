"""The command `dora-jax`, also `python -m dora_jax`: works on adapter folders, without a model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from dora_jax.disk import ignore_late_threads
from dora_jax.errors import DoRAError
from dora_jax.interrupts import InterruptError, raised


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      args: the words of the command line; by default those of this process.

    Returns:
      The exit status. 0: done; for `diff`: equal. 1: an error, in one line on stderr; for `diff`:
      different. 2: the command line is wrong; for `diff` any error, as for diff(1). 130 and 143:
      interrupted, terminated. With `--json` an error is a JSON object on stdout, too.

    Example:
      >>> main(["inspect", "no_such_folder"])
      1
    """
    words = sys.argv[1:] if args is None else list(args)
    ignore_late_threads()
    try:
        with raised():
            return _run(words)
    except InterruptError as error:
        return _failed(error, error.status, words)


def _run(words: Sequence[str]) -> int:
    try:
        import tyro
    except ImportError:
        return _failed("the command needs tyro: pip install 'dora-jax[cli]'", 1, words)
    from dora_jax.cli.commands import Command, Diff

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command: Any = tyro.cli(Command, prog="dora-jax", description=DESCRIPTION, args=words)
    except SystemExit as exit:
        print(said.getvalue(), end="", file=sys.stderr)
        if "--json" in words and exit.code:
            print(json.dumps({"error": f"the command line is wrong: {_unframed(said.getvalue())}"}))
        raise
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats exceptions that are raised
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            status = command.run()
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"dora-jax: warning: {_one_line(warning.message)}", file=sys.stderr)
        return int(status)
    except (DoRAError, OSError) as error:
        return _failed(error, 2 if isinstance(command, Diff) else 1, words)


def _failed(error: object, status: int, words: Sequence[str]) -> int:
    """Says in one line what went wrong, with `--json` as JSON too; returns the exit status."""
    if "--json" in words:
        print(json.dumps({"error": _one_line(error)}))
    print(f"dora-jax: {_one_line(error)}", file=sys.stderr)
    return status


DESCRIPTION = """Work on folders of DoRA adapters: those of dora_jax (Orbax) and of Hugging Face
PEFT.

Exit status: 0 if done, 1 if not, 2 if the command line is wrong. For diff: 0 if the adapters are
equal, 1 if they differ, 2 if there was an error. 130 if it was interrupted."""


def _one_line(message: object) -> str:
    """Returns a message in one line, with the command's options in place of the library's."""
    text = " ".join(str(message).split())
    for argument in ("allow_base_mismatch", "overwrite"):
        text = text.replace(f"{argument}=True", f"--{argument.replace('_', '-')}")
    return text


def _unframed(text: str) -> str:
    """Returns what tyro prints in a frame as one line."""
    return " ".join("".join(c for c in text if c not in "╭╮╰╯│─").split())
