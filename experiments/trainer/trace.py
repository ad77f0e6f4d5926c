"""A trace of a few training steps, for XProf or Perfetto."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

_FIRST, _STEPS = 4, 3
"""Of this process: the first step that is traced, after what compiles, and how many are."""


class Trace(contextlib.AbstractContextManager):
    """Writes a trace of three steps into a folder; without a folder it does nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._taken, self._runs = folder, 0, False

    @property
    def at_an_edge(self) -> bool:
        """Whether the trace starts or stops before the next step: no other one should run then."""
        return self._folder is not None and self._taken + 1 in (_FIRST, _FIRST + _STEPS)

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Returns the context in which the next step is taken, which names it in the trace."""
        self._taken += 1
        if self._folder is not None and self._taken == _FIRST:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        elif self._taken == _FIRST + _STEPS:
            self._stop()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()

    def __exit__(self, *_: object) -> None:
        self._stop()
