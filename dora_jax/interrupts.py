"""The command `dora-jax` ends in one line when it is interrupted, during its imports as well.

Importing the library in any other process changes nothing: signals are the program's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptError(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
      status: the exit status that says by which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.status = 128 + number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises `InterruptError` for the first signal in the block; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def raise_once(number: int, _: FrameType | None) -> NoReturn:
        for each in _SIGNALS:
            signal.signal(each, _end_at_once)
        raise InterruptError(number)

    before = {number: signal.signal(number, raise_once) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: int, _: FrameType | None) -> NoReturn:
    error = InterruptError(number)
    if "--json" in sys.argv:
        os.write(1, f'{{"error": "{error}"}}\n'.encode())
    os.write(2, f"dora-jax: {error}\n".encode())
    os._exit(error.status)


def _is_command() -> bool:
    """Whether this process is `dora-jax` or `python -m dora_jax`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # as long as Python looks for the module
        return "dora_jax" in sys.orig_argv
    return os.path.basename(program) == "dora-jax"


if _is_command() and threading.current_thread() is threading.main_thread():
    for _number in _SIGNALS:
        signal.signal(_number, _end_at_once)
