"""Several processes as one run, on JAX's own runtime: how they find each other, and how they end.

On one machine nothing changes. On several, the same command is started on every host, each process
runs the same program, and `jax.devices()` are the devices of all.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# After so long without a sign of life a process counts as lost, and JAX ends the others. JAX's own
# default is 100.
HEARTBEAT_SECONDS = 15


@contextlib.contextmanager
def start(advice: str, *, detect: bool = True) -> Iterator[None]:
    """Joins this process to its run, before JAX starts its devices, and ends all of them together.

    The processes find each other by the variables `JAX_COORDINATOR_ADDRESS` (host and port of the
    first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; or by what JAX detects: a TPU slice,
    Slurm, Open MPI, Kubernetes. Where there is neither, the run has one process.

    A run of several processes ends when the block has ended in all of them. If it raises in one, or
    if a process is lost, the others end with a status that is not 0, at most about twice
    `HEARTBEAT_SECONDS` later: a step that waits for a lost process would wait for ever.

    Args:
        advice: Tells how to continue, for the line in which a process ends that lost another one.
        detect: Whether to ask JAX where the variables are not set.

    Raises:
        ValueError: Some of the variables are set, but not all, or one is no number.

    Example:
        >>> with start("Start it again.", detect=False):
        ...     jax.process_count()
        1
    """
    if not _join(detect):
        yield
        return
    try:
        yield
        multihost_utils.sync_global_devices("the run has ended")
    except BaseException as error:
        status = _say(error, advice)
        if status == 0:
            raise
        # At once: JAX's own end would wait for the others, which may be waiting for this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _join(detect: bool) -> bool:
    """Joins the processes of the run; returns whether there are several."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name, "") for name in names]
    if not any(given) and not detect:
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if any(given):
        for name, value in zip(names, given, strict=True):
            if not value or (name != names[0] and not value.isdecimal()):
                raise ValueError(f"{name} is {value!r}: set all of {', '.join(names)}")
        jax.distributed.initialize(
            given[0],
            int(given[1]),
            int(given[2]),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    else:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except ValueError as error:
            if "must be defined" in str(error) or "should be defined" in str(error):
                return False  # no cluster
            raise
    return jax.process_count() > 1


def _say(error: BaseException, advice: str) -> int:
    """Prints why this process ends; returns its status."""
    own = f"Process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, SystemExit):
        if isinstance(error.code, int | None):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt):
        print(f"{own}: {str(error) or 'interrupted'}. {advice}", file=sys.stderr)
        return int(getattr(error, "status", 130))
    if _is_of_another(error):
        reason = str(error).splitlines()[0][:300]
        print(f"{own} lost another one, and ends ({reason}). {advice}", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    return 1


def _is_of_another(error: BaseException) -> bool:
    """Returns whether an error tells of another process: a status of XLA's, in whatever class."""
    text = str(error)
    words = r"gloo|connection|unavailable|deadline_exceeded|heartbeat|coordination"
    is_status = isinstance(error, RuntimeError | ValueError) and re.match("[A-Z_]+: ", text)
    return bool(is_status) and re.search(words, text, re.IGNORECASE) is not None
