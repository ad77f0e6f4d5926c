"""Folders that all processes of a run write, on a file system that all of them see."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from dora_jax.processes import failing_together, first_alone


@contextlib.contextmanager
def written_by_all(
    begin: Callable[[], contextlib.AbstractContextManager[pathlib.Path]],
) -> Iterator[pathlib.Path]:
    """Yields to all processes the folder that the first one makes, and puts it into its place.

    That is done when all have come to the end of the block, and the first one alone does it.

    Args:
      begin: checks what is there, and returns the block of `written_whole`.

    Raises:
      CheckpointError: of what the first process does, in all processes.
    """
    with contextlib.ExitStack() as whole:
        yield pathlib.Path(first_alone(lambda: str(whole.enter_context(begin()))))
        with failing_together():
            whole.close()
