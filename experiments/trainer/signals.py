"""Signals that ask the process to end: Ctrl-C (SIGINT), and SIGTERM, as schedulers send it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from dora_jax.interrupts import InterruptError
from experiments import end_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedStepError(InterruptError):
    """A signal asked the process to end, and the step that it was in is saved.

    Attributes:
        saved_step: That step, if one was saved.
    """

    def __init__(self, number: int, saved_step: int | None = None) -> None:
        super().__init__(number)
        self.saved_step = saved_step
        if saved_step is not None:
            self.args = (f"{self.args[0]} at step {saved_step}, which is saved",)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Gives both signals a handler within the block; outside of the main thread it cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@dataclasses.dataclass
class Asked:
    """Whether a signal has asked the run to end: its number, or None."""

    number: int | None = None

    def at(self, step: int) -> int | None:
        """Returns the number after a step. Every step has to ask, in all processes.

        Several processes end after the same step. JAX tells all of them when one gets SIGTERM.
        """
        if jax.process_count() > 1 and reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number


@contextlib.contextmanager
def deferred() -> Iterator[Asked]:
    """Remembers the first signal that comes within the block; a second one ends the process.

    Of several processes, each leaves SIGTERM to JAX's own handler, and ends at once on Ctrl-C.
    """
    asked = Asked()

    def remember(number: int, frame: FrameType | None) -> None:
        if asked.number is not None:
            end_at_once(number, frame)
        asked.number = number
        os.write(2, b"\nSaving the step that is running. A second signal ends at once.\n")

    with handled_by(remember) if jax.process_count() == 1 else contextlib.nullcontext():
        yield asked
