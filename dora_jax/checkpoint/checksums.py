"""The checksums of arrays, each of what one process holds.

An array that one process holds has one checksum. Of an array that is cut over several processes,
each of them reads its own parts, and only the checksums travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dora_jax.adapters.placement import host_value
from dora_jax.checkpoint.manifest import digest
from dora_jax.errors import AdapterError
from dora_jax.processes import several, spans_processes

# Where a part of an array starts and stops, on each axis.
Bounds = tuple[tuple[int, int], ...]


def checksums(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what the manifest says of the bytes of arrays, by name.

        {"sha256": ...}                            one process holds the array, or all hold the same
        {"parts": [[[[0, 4], [0, 8]], ...], ...]}  the bounds and the SHA-256 of each part

    Raises:
      AdapterError: processes hold different values of an array that each has to itself; names it.
    """
    if not several():
        return {name: {"sha256": digest(_bytes(host_value(x)))} for name, x in arrays.items()}
    parts = {name: _parts(x) for name, x in arrays.items()}
    own = [data for each in parts.values() for data in each.values()]
    empty = b"\0" * 32
    rows = [empty if x is None else bytes.fromhex(digest(_bytes(np.asarray(x)))) for x in own]
    table = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 32)
    found = iter(np.moveaxis(multihost_utils.process_allgather(table), 1, 0))
    entries = {}
    for name, each in parts.items():
        given = [(bounds, next(found)) for bounds in each]
        if not spans_processes(arrays[name]) and (given[0][1] != given[0][1][0]).any():
            raise AdapterError(
                f"{name} differs between the processes, each of which has it to itself: make it "
                "the same in all, or one array over all devices"
            )
        texts = [
            [list(map(list, bounds)), row.max(axis=0).tobytes().hex()] for bounds, row in given
        ]
        whole = len(texts) == 1
        entries[name] = {"sha256": texts[0][1]} if whole else {"parts": texts}
    return entries


def matches(value: Any, entry: Mapping[str, Any]) -> bool:
    """Returns whether an array, or what this process holds of it, has the checksums of its entry.

    Args:
      value: on the host; or an array that spans processes, of which `saved_in_parts_of` is true.
      entry: of the array in a manifest.
    """
    known = _checksums_of(entry)
    if spans_processes(value):
        held = {_bounds(x.index, value.shape): x.data for x in value.addressable_shards}
        return all(known[bounds] == digest(_bytes(np.asarray(x))) for bounds, x in held.items())
    return all(
        digest(_bytes(value[tuple(slice(*pair) for pair in bounds)])) == checksum
        for bounds, checksum in known.items()
    )


def saved_in_parts_of(like: jax.Array, entry: Mapping[str, Any]) -> bool:
    """Returns whether the parts of an array, of all processes, are those that an entry has."""
    if [list(like.shape), like.dtype.name] != [entry["shape"], entry["dtype"]]:
        return False
    indices = like.sharding.devices_indices_map(like.shape).values()
    return {_bounds(index, like.shape) for index in indices} <= _checksums_of(entry).keys()


def _checksums_of(entry: Mapping[str, Any]) -> dict[Bounds, str]:
    """Returns the checksum of each part; a whole array is one part."""
    if "sha256" in entry:
        return {tuple((0, n) for n in entry["shape"]): entry["sha256"]}
    return {tuple(map(tuple, bounds)): checksum for bounds, checksum in entry["parts"]}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _parts(x: Any) -> dict[Bounds, Any]:
    """Returns the parts of an array, each once and in the same order in every process.

    The data of a part is None in all processes but the one that is to read it. What a process has
    to itself is one part, which each of them reads.
    """
    if not spans_processes(x):
        value = host_value(x)
        return {tuple((0, n) for n in value.shape): value}
    found: dict[Bounds, Any] = {}
    for shard in x.global_shards:
        if shard.replica_id == 0:
            found[_bounds(shard.index, x.shape)] = shard.data
    return dict(sorted(found.items()))


def _bytes(x: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array, without a copy as a rule."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
