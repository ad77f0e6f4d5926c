"""`python -m tests.processes.lost VICTIM SECONDS`: a run of which one process kills itself.

The others are busy on their host for so many seconds, and then wait for it in a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.trainer import distributed


def main(victim: int, seconds: float) -> None:
    multihost_utils.process_allgather(np.arange(3))
    if jax.process_index() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    multihost_utils.process_allgather(np.arange(3))
    raise AssertionError("a lost process answered")


if __name__ == "__main__":
    with distributed.start("Start it again."):
        main(int(sys.argv[1]), float(sys.argv[2]))
