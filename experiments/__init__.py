"""Experiments with DoRA, run from a checkout of the repository.

Every module in this folder is one experiment: `python -m experiments.quickstart`, `compare`,
`glue`, `commonsense`, `math`, `efficiency` and `plan`. They are built from seven packages: `tasks`
(data and metrics), `models`, `trainer` (methods and the training loop), `sweeps` (many runs in one
program), `language` (decoders that are tuned on answers), `benchmarks` (speed and memory) and
`planning` (steps for devices that are not there).
Results that are kept lie in `results/`. The experiments use the public names of `dora_jax` and
nothing else of it.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def end_at_once(number: int, _: FrameType | None) -> NoReturn:
    """Ends the process in one line, when a signal comes during the imports or a second time."""
    text = "Interrupted." if number == signal.SIGINT else "Terminated."
    os.write(2, f"\n{text}\n".encode())
    os._exit(128 + number)


# While Python looks for the module of `python -m experiments.NAME`, before its imports.
if sys.argv[:1] == ["-m"] and any(word.startswith("experiments.") for word in sys.orig_argv):
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, end_at_once)
