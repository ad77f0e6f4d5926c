"""Runs of several processes: what one of them does for all, and what all are to agree on.

All processes of a run call these functions, in the same order. A run of one process computes
nothing for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dora_jax.errors import CheckpointError


def several() -> bool:
    """Returns whether the run has several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def spans_processes(x: Any) -> bool:
    """Returns whether an array is on devices of several processes, so that none can read it all."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    return known and not x.is_fully_addressable


def from_each(text: str) -> list[str]:
    """Returns the text of every process, in their order."""
    if not several():
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size, np.int32)).ravel()
    padded = np.zeros(max(sizes.max(), 1), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, sizes, strict=True)]


def same_everywhere(text: str) -> str:
    """Returns the text that the first process has."""
    return from_each(text if is_first() else "")[0]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raises an error of one process in all of them.

    The block may not wait for other processes.

    Raises:
      CheckpointError: the block failed in another process; has its message.
    """
    try:
        yield
    except Exception as error:
        from_each(f"{error}" or type(error).__name__)
        raise
    for process, problem in enumerate(from_each("")):
        if problem:
            raise CheckpointError(f"process {process}: {problem}")


def first_alone(function: Callable[[], str]) -> str:
    """Returns what a function returns in the first process, which alone calls it.

    Raises:
      CheckpointError: in the others, if it failed in the first; has its message.
    """
    with failing_together():
        text = function() if is_first() else ""
    return same_everywhere(text)


def on_first_host(x: Any) -> np.ndarray | None:
    """Returns an array on the host of the first process, and None in the others.

    The devices gather this one array; no other host holds more than its own part.
    """
    if spans_processes(x) and not x.is_fully_replicated:
        x = jax.jit(_identity, out_shardings=_replicated(x.sharding))(x)
    return np.asarray(x) if is_first() else None


def _replicated(sharding: Any) -> NamedSharding:
    """Returns the sharding of whole copies on the same devices."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())


def _identity(x: jax.Array) -> jax.Array:
    return x
