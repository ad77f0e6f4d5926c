"""Signals that ask the process to end: Ctrl-C (SIGINT), and SIGTERM, as schedulers send it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from dora_jax.interrupts import InterruptError
from experiments import end_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedStepError(InterruptError):
    """The process was asked to end, and a step was saved before.

    Attributes:
        saved_step: That step.
    """

    def __init__(self, number: int, saved_step: int) -> None:
        super().__init__(number)
        self.args = (f"{self} at step {saved_step}, which is saved",)
        self.saved_step = saved_step


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
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread receives signals
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if asked.number is not None:
            end_at_once(number, frame)
        asked.number = number
        os.write(2, b"\nSaving the step that is running. A second signal ends at once.\n")

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
