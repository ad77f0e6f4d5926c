"""Times several calls in turn, so that other work on the machine slows all of them equally."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call in each round. Two calls timed together have the same rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)

    def over(self, other: Times) -> Ratio:
        """Returns the ratio of this call to another, round by round."""
        ratios = np.array(self.seconds) / np.array(other.seconds)
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        return Ratio(float(median), (float(low), float(high)))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median of the ratios of all rounds, and their first and third quartile.

    Both calls of a round ran at about the same time. Therefore other work on the machine changes
    the median of the ratios less than the ratio of the medians.
    """

    median: float
    quartiles: tuple[float, float]


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 3,
    pause: float = 0.0,
    steps: int = 1,
) -> dict[str, Times]:
    """Times every call once in each round.

    From round to round the order is rotated by one and reversed, so that no call is always first or
    always after the same call. The garbage collector runs only between rounds.

    Args:
        calls: The calls by name. Each returns when its work is done.
        rounds: Number of timed rounds.
        warm_up: Number of rounds before these, which compile and fill the caches.
        pause: Seconds to sleep before each call.
        steps: Number of steps that a call takes before it waits. The seconds are those of one.

    Example:
        >>> times = time_in_turn({"a": lambda: None, "b": lambda: None}, rounds=2, warm_up=0)
        >>> len(times["b"].seconds), times["a"].over(times["a"]).median
        (2, 1.0)
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(warm_up + rounds):
            gc.collect()
            for name in order if i % 2 else reversed(order):
                time.sleep(pause)
                start = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - start)
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return {
        name: Times(tuple(s / steps for s in values[warm_up:])) for name, values in seconds.items()
    }
