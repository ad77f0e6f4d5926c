"""Prints what became of each model: `python -m tests.foreign.table [part of a name]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tests.foreign import flax_models, hugging_face, libraries
from tests.foreign.harness import LinenCase, NNXCase, Report, run

CASES: dict[str, Callable[[], LinenCase | NNXCase]] = {
    **hugging_face.CASES,
    **flax_models.CASES,
    **libraries.CASES,
}
HEADER = (
    f"{'model':32} {'layers':>6} {'trained':>7} {'start':>8} {'optim.':>8} "
    f"{'loss':>13} {'merged':>8} {'kernels':>8} {'output':>6}"
)


def row(name: str, report: Report) -> str:
    before, after = report.losses
    return (
        f"{name:32} {report.layers:6} {report.trainable:7} {report.start:8.1e} "
        f"{report.start_optimized:8.1e} {before:6.3f}>{after:6.3f} {report.merged:8.1e} "
        f"{report.kernels:8.1e} {report.scale:6.2f}"
    )


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    print(HEADER, flush=True)
    for name, build in CASES.items():
        if part in name:
            start = time.perf_counter()
            report = run(build())
            print(row(name, report), f"{time.perf_counter() - start:5.1f} s", flush=True)
            if report.idle:
                print("  idle:", report.idle)


if __name__ == "__main__":
    main()
