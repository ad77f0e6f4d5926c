"""The time of a step by roofline, and the largest batch, from what was counted in a program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.planning.collectives import Collective
    from experiments.planning.slices import Device

ASSUMPTIONS = (
    "products run at the published peak; nothing else takes time on the matrix units",
    "HBM: arguments are read once, results written once, temporaries and what collectives gather "
    "written once and read once",
    "network: all links of a device work at once, and each collective moves the least that a ring "
    "over its devices can",
)
"""What the estimate takes for granted. Each makes it a lower bound."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a program on each device.

    Attributes:
        arguments: The weights, adapters, moments and batch, as they lie in memory.
        temporaries: The most that exist at one time.
        other: Constants and small results.
    """

    arguments: int
    temporaries: int
    other: int = 0

    @property
    def total(self) -> int:
        """All of them. A step writes its results over its arguments."""
        return self.arguments + self.temporaries + self.other


def moved_bytes(one: Collective, mesh: Mapping[str, int]) -> float:
    """Returns the bytes that each device sends for a collective, in a ring.

    Example:
        >>> from experiments.planning.collectives import Collective
        >>> one = Collective("all-reduce", (("f32", (10,)),), ("fsdp",), 1)
        >>> moved_bytes(one, {"fsdp": 4})  # 40 bytes, reduced and gathered: 3/4 of them twice
        60.0
    """
    if one.kind == "collective-permute":
        return float(one.bytes)
    devices = math.prod(mesh[axis] for axis in one.axes)
    passes = 2 if one.kind == "all-reduce" else 1
    return passes * one.bytes * (devices - 1) / max(devices, 1)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each part of a step, if it were alone."""

    products: float
    memory: float
    network: float

    @property
    def least(self) -> float:
        """Seconds of a step whose parts run beside each other."""
        return max(self.products, self.memory, self.network)

    @property
    def most(self) -> float:
        """Seconds of a step whose parts run one after the other."""
        return self.products + self.memory + self.network


def estimate_times(
    device: Device,
    operations: float,
    memory: Memory,
    collectives: list[Collective],
    mesh: Mapping[str, int],
) -> Times:
    """Returns the times of a step. `operations` are those of one device."""
    gathered = sum(one.bytes for one in collectives if one.kind == "all-gather")
    through_memory = memory.arguments + 2 * (memory.temporaries + gathered)
    sent = sum(moved_bytes(one, mesh) for one in collectives)
    return Times(
        operations / (device.teraflops * 1e12),
        through_memory / (device.hbm_gbps * 1e9),
        sent / (device.link_gbps * 1e9),
    )


def largest_batch(rows: tuple[int, int], totals: tuple[int, int], limit: float) -> int:
    """Returns how many sequences of a device fit, on the line through two compiled programs.

    Args:
        rows: The sequences of the two programs.
        totals: The bytes of the two programs.
        limit: The bytes that a program may have.

    Example:
        >>> largest_batch((1, 2), (3, 4), 10)
        8
    """
    slope = (totals[1] - totals[0]) / (rows[1] - rows[0])
    if slope <= 0:
        return rows[1] if max(totals) <= limit else 0
    return max(0, math.floor(rows[0] + (limit - totals[0]) / slope))
