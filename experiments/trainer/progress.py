"""The progress line: what is running, how far it is, how fast, and how long it will take."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

_RECENT = 20  # steps, over which the speed is averaged


@dataclasses.dataclass
class Speed:
    """How fast the recent steps were.

    Attributes:
        tokens: Tokens in a step, padding included; 0 if that is not known.
        flops_per_token: From `flops.flops_per_token`.
        peak: FLOP/s that the devices can do at most; None if it is not known.

    Example:
        >>> speed = Speed(tokens=1000, flops_per_token=6_000_000, peak=1e11)
        >>> for seconds in (0.1, 0.3):
        ...     speed.add(seconds)
        >>> speed.figures()
        {'tokens/s': '5,000', 'MFU': '30.0 %'}
    """

    tokens: int
    flops_per_token: int = 0
    peak: float | None = None

    def __post_init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)

    def add(self, seconds: float) -> None:
        """Adds the seconds of a step."""
        self._recent.append(seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second in the recent steps, if that is known."""
        seconds = sum(self._recent)
        return self.tokens * len(self._recent) / seconds if self.tokens and seconds else None

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation: the share of the peak that the model's own FLOPs take."""
        rate = self.tokens_per_second
        return (
            None if rate is None or self.peak is None else rate * self.flops_per_token / self.peak
        )

    def figures(self) -> dict[str, str]:
        """Returns the figures that are known, as the progress line has them."""
        rate, share = self.tokens_per_second, self.utilisation
        shown = {} if rate is None else {"tokens/s": f"{rate:,.0f}"}
        return shown if share is None else shown | {"MFU": f"{share:.1%}".replace("%", " %")}


class Progress(contextlib.AbstractContextManager):
    """A progress line on stderr. In a log file it is a new line every 15 seconds.

    Args:
        title: What is running.
        steps: Number of all steps.
        first: Number of the steps taken before.
        shown: Whether anything is shown: one process of several does.
    """

    def __init__(self, title: str, steps: int, first: int = 0, *, shown: bool = True) -> None:
        self._title, self._steps = title, steps
        self._bar = tqdm(
            desc=title,
            total=steps,
            initial=first,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
            disable=not shown,
        )

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, values: Mapping[str, float], speed: Speed) -> None:
        """Shows that one more step is done."""
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        self._bar.set_postfix({**shown, **speed.figures()}, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line above the progress line, on stdout."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stdout)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Shows for how long the block has been compiling; what it took is no part of the rate."""
        start, done = time.monotonic(), threading.Event()

        def show() -> None:
            while True:
                seconds = time.monotonic() - start
                self._bar.set_description(f"{self._title}: compiling ... {seconds:.0f} s")
                if done.wait(1 if sys.stderr.isatty() else 15):
                    return

        watch = threading.Thread(target=show, daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()
            self._bar.set_description(self._title)
            if not self._bar.disable:
                self._bar.unpause()
        if (seconds := time.monotonic() - start) >= 1:
            self.say(f"compiled in {seconds:.0f} s")


def tokens_in(batch: Any) -> int:
    """Returns the number of tokens in a batch, padding included; 0 if it holds none.

    Example:
        >>> import numpy as np
        >>> tokens_in({"input_ids": np.zeros((4, 16)), "label": np.zeros(4)})
        64
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return 0 if ids is None else int(ids.size)
