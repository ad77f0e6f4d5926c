"""The command `dora-jax` ends in one line when it is interrupted, during its imports as well.

Importing the library in any other process changes nothing: signals are the program's own. A script
may use `raised` for a block of its own.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptError(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
      number: the signal.
      status: the exit status that says by which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.number = number
        self.status = 128 + number


@contextlib.contextmanager
def raised(again: Callable[[int, FrameType | None], object] | None = None) -> Iterator[None]:
    """Raises `InterruptError` for the first signal in the block; a second one ends the process.

    Python prints what a signal's handler raises in a destructor or in a callback of the garbage
    collector (JAX has one), and goes on. Such a signal is sent once more. Extensions in C++ may
    raise an error of their own instead. So any error after the signal is taken for it.

    Args:
      again: the handler of the second signal. The default ends the process in one line.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    main = threading.get_ident()
    ignored: list[int] = []  # the signal whose error Python ignored, until it is raised again
    came: list[int] = []

    def raise_once(number: int, _: FrameType | None) -> NoReturn:
        ignored.clear()
        came.append(number)
        for each in _SIGNALS:
            signal.signal(each, again or _end_at_once)
        raise InterruptError(number)

    def send_again() -> None:
        time.sleep(0.01)
        if ignored:  # to the main thread, which may wait in a system call
            signal.pthread_kill(main, ignored[0])

    def when_ignored(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, InterruptError):
            return hook(what)
        for each in _SIGNALS:
            signal.signal(each, raise_once)
        ignored.append(what.exc_value.number)
        _thread.start_new_thread(send_again, ())  # threading takes locks, which may be held here

    before = {number: signal.signal(number, raise_once) for number in _SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, when_ignored
    try:
        yield
        if ignored:
            raise_once(ignored[0], None)
    except Exception as error:
        if came:
            raise InterruptError(came[0]) from error
        raise
    finally:
        ignored.clear()
        sys.unraisablehook = hook
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
