"""Command lines of the experiments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_interrupt(message: str) -> Iterator[None]:
    """Ends the process with a message, and without a traceback, when the user presses Ctrl-C.

    Args:
        message: Tells how to continue.

    Raises:
        SystemExit: The user interrupted the block.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted. {message}") from None
