"""Reads thousands of damaged folders: own, PEFT's, Hugging Face's.

`python -m tests.fuzz --seed 1 --count 4000` prints what came of them: silent wrong results, errors
that are not the library's, what took more than 2 s or 100 MB. The exit status is 0 if none did.
`--only NUMBER` repeats one mutation of a seed.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections import Counter

from tests.fuzz.runs import BAD, run, table


def main() -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--count", type=int, default=4000, help="how many mutations")
    parser.add_argument("--only", type=int, help="the number of the one mutation to repeat")
    parser.add_argument("--verbose", action="store_true", help="print every mutation")
    args = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in run(args.seed, args.count, args.only):
        counts[outcome.said.partition(":")[0], outcome.kind] += 1
        if args.verbose or args.only is not None or outcome.kind in BAD:
            print(f"{outcome.number} {outcome.kind}: {' '.join(outcome.said.split())[:600]}")
        faulthandler.dump_traceback_later(60, exit=True)  # what no signal interrupts
    print(table(counts))
    return int(any(kind in BAD for _, kind in counts))


if __name__ == "__main__":
    sys.exit(main())
