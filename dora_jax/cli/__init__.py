"""The command `dora-jax`, also `python -m dora_jax`: works on adapter folders, without a model."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from dora_jax.errors import DoRAError


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      args: the words of the command line; by default those of this process.

    Returns:
      The exit status. 0: done; for `diff`: equal. 1: an error, in one line on stderr; for `diff`:
      different. 2: the command line is wrong; for `diff` any error, as for diff(1).

    Example:
      >>> main(["inspect", "no_such_folder"])
      1
    """
    try:
        import tyro
    except ImportError:
        print("dora-jax: the command needs tyro: pip install 'dora-jax[cli]'", file=sys.stderr)
        return 1
    from dora_jax.cli.commands import Command, Diff

    command = tyro.cli(Command, prog="dora-jax", description=DESCRIPTION, args=args)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats exceptions that are raised
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            status = command.run()
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"dora-jax: warning: {_one_line(warning.message)}", file=sys.stderr)
        return status
    except (DoRAError, OSError) as error:
        print(f"dora-jax: {_one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("dora-jax: interrupted", file=sys.stderr)
        return 130
    return 2 if isinstance(command, Diff) else 1


DESCRIPTION = """Work on folders of DoRA adapters: those of dora_jax (Orbax) and of Hugging Face
PEFT.

Exit status: 0 if done, 1 if not, 2 if the command line is wrong. For diff: 0 if the adapters are
equal, 1 if they differ, 2 if there was an error."""


def _one_line(message: object) -> str:
    """Returns a message in one line, with the command's options in place of the library's."""
    text = " ".join(str(message).split())
    for argument in ("allow_base_mismatch", "overwrite"):
        text = text.replace(f"{argument}=True", f"--{argument.replace('_', '-')}")
    return text
