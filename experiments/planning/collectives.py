"""The collectives of a compiled program, read from XLA's text.

XLA's own cost analysis counts the body of a loop once. Here each operation counts as often as it
runs. Of a conditional, every branch counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32}
BITS |= {"s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}

_SHAPE = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_NAMES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
_COLLECTIVE = re.compile(rf"= (.*?) ({_NAMES})(-start)?\((?!\))")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of a program.

    Attributes:
        kind: XLA's name, such as `"all-gather"`.
        shapes: Dtype and sizes of each array that it makes; for a reduce-scatter, of each that it
            takes.
        axes: The axes of the mesh along which devices speak with each other.
        count: How often a step runs it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    axes: tuple[str, ...]
    count: int

    @property
    def bytes(self) -> int:
        """Bytes of the whole arrays, for all runs of a step."""
        return self.count * sum(array_bytes(*shape) for shape in self.shapes)


def array_bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    """Returns the bytes of an array without padding.

    Example:
        >>> array_bytes("bf16", (2, 3))
        12
    """
    return math.prod(sizes) * BITS.get(dtype, 8 if dtype.startswith("f8") else 32) // 8


def read_collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a program; none of an empty text.

    Args:
        hlo: The text of an optimised program, of a CPU or a TPU.
        mesh: The size of each axis of its mesh, in order.
    """
    computations, entry = _computations(hlo)
    if not entry:
        return []
    runs = _runs(computations, entry)
    # XLA for TPU may spread one collective over several fusions. It runs where it is started.
    started: defaultdict[str, set[str]] = defaultdict(set)
    for name, lines in computations.items():
        if any("AsyncCollectiveStart" in line for line in lines):
            for line in lines:
                if _COLLECTIVE.search(line):
                    started[_channel(line)].add(name)
    found: Counter[tuple[str, tuple[tuple[str, tuple[int, ...]], ...], tuple[str, ...]]] = Counter()
    for name, count in runs.items():
        for line in computations[name]:
            match = _COLLECTIVE.search(line)
            if match and name in started.get(_channel(line), {name}):
                axes, size = _axes(line, mesh)
                kind, shapes = _arrays(match, name, size)
                found[kind, shapes, axes] += count
    return [Collective(*key, count) for key, count in found.items() if key[1]]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by name, and the name of the first that runs."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if match := _HEAD.match(line):
            current = match[2]
            found[current] = []
            entry = current if match[1] else entry
        elif line.rstrip() == "}":  # not that of an attribute of several lines
            current = None
        elif current is not None:
            found[current].append(line)
    return found, entry


def _runs(computations: Mapping[str, list[str]], entry: str) -> Counter[str]:
    """Returns how often each computation runs in one run of the program."""
    calls = {name: list(_calls(lines, computations)) for name, lines in computations.items()}
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for called, inner in calls.get(name, ()):
            visit(called, times * inner)

    visit(entry, 1)
    return runs


def _calls(lines: list[str], computations: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        if loop := _WHILE.search(line):
            yield loop[2], _trips(line, computations[loop[1]], computations[loop[2]])
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += re.findall(r"%?([\w.-]+)", branches)
        yield from ((name, 1) for name in called if name in computations)


def _trips(line: str, condition: list[str], body: list[str]) -> int:
    """Returns the trips of a loop that counts from 0 up to a constant; 1 if it is none."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    limits = [
        int(n) for one in condition for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", one)
    ]
    counter = re.search(
        r"get-tuple-element\(.*?\), index=(\d+)",
        next((one for one in condition if "get-tuple-element(" in one), ""),
    )
    if not limits:
        return 1
    step = _step(body, int(counter[1])) if counter else 1
    return -(-max(limits) // step)


def _step(body: list[str], index: int) -> int:
    """Returns what a loop adds to an element of its state in each trip."""
    root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
    state = re.findall(r"%([\w.-]+)", root.rpartition(" tuple(")[2].partition(")")[0])
    defined = {m[1]: line for line in body if (m := re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line))}
    if index >= len(state) or " add(" not in (line := defined.get(state[index], "")):
        return 1
    for name in re.findall(r"%([\w.-]+)", line.partition(" add(")[2].partition(")")[0]):
        if constant := re.search(r" constant\((\d+)\)", defined.get(name, "")):
            return int(constant[1]) or 1
    return 1


def _channel(line: str) -> str:
    found = re.search(r"channel_id=(\d+)", line)
    return found[1] if found else line


def _arrays(
    match: re.Match[str], computation: str, size: int
) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Returns the kind of a collective, and its arrays."""
    kind = match[2]
    shapes = [
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(match[1])
    ]
    if match[3] and kind in ("all-gather", "collective-permute"):
        # The start of an operation has its arguments, its results and counters.
        shapes = [max(shapes, key=lambda shape: array_bytes(*shape))]
    if kind == "reduce-scatter":
        shapes = [(dtype, (size, *sizes)) for dtype, sizes in shapes]
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion that keeps a part of the sum
    return kind, tuple(shapes)


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns the axes along which the members of a group differ, and the size of a group."""
    sizes = tuple(mesh.values())
    members = _first_group(line, math.prod(sizes))
    coordinates = np.array(np.unravel_index(np.array(members), sizes))
    differ = coordinates.max(1) != coordinates.min(1)
    return tuple(name for name, varies in zip(mesh, differ, strict=True) if varies), len(members)


def _first_group(line: str, devices: int) -> list[int]:
    """Returns the devices of the first group of a collective, by their number in the mesh."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [int(n) for n in re.findall(r"\d+", pairs[1])[:2]]
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return [int(n) for n in groups[1].split(",")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        numbers = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            numbers = numbers.transpose([int(n) for n in iota[3].split(",")])
        return list(numbers.reshape(shape)[0])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        inside = set(re.findall(r"'([^']+)'", named[2]))
        numbers = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        return list(numbers[tuple(slice(None) if a in inside else 0 for a in axes)].ravel())
    return list(range(devices))


def totals(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """Returns the number and the bytes of each kind, for a step."""
    found: dict[str, tuple[int, int]] = {}
    for one in collectives:
        count, size = found.get(one.kind, (0, 0))
        found[one.kind] = (count + one.count, size + one.bytes)
    return found


def gathered_weights(collectives: list[Collective], weights: Mapping[int, str], parts: int) -> int:
    """Returns the bytes of frozen weights that a step gathers from the devices of "fsdp".

    XLA gathers a weight at once, or while it multiplies by it, part by part.

    Args:
        collectives: From `read_collectives`.
        weights: The dtype of frozen weights by the number of their elements on the devices of one
            batch: a layer's, where layers are stacked.
        parts: Devices among which a weight is cut.
    """
    return sum(
        one.count * array_bytes(*shape)
        for one in collectives
        for shape in one.shapes
        if one.axes == ("fsdp",) and _is_weight(one.kind, shape, weights, parts)
    )


def _is_weight(
    kind: str, shape: tuple[str, tuple[int, ...]], weights: Mapping[int, str], parts: int
) -> bool:
    dtype, elements = shape[0], math.prod(shape[1])
    if kind == "collective-permute":
        elements *= parts
    elif kind != "all-gather":
        return False
    # XLA may pad what it gathers by a few rows.
    return any(dtype == d and n <= elements < 1.03 * n for n, d in weights.items())


HLO_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "s8"}
"""XLA's names of the dtypes that weights have."""
