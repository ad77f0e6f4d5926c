"""Kills training runs at random moments, and checks what they come to when they are started again.

`python -m tests.kills --seed 0 --count 100` kills the quickstart and a training loop of one's own,
in turn and so many times in all: with KILL, TERM or INT, at moments drawn from the whole time of a
run, its imports included. Every run is started again until it ends. It has to end with the same
bits as one that was never killed, metrics included, and leave the same files. Prints a line for
each kill; the exit status is 1 if a run ended otherwise.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.tiny_bert import write_tiny_bert

REPOSITORY = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LOOP = """if True:
    import sys
    from tests.checkpoint.killed import run
    run(sys.argv[1], 60, 3, print)
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """What is killed.

    Attributes:
      words: its command line, for a folder of results.
      outcome: everything that has to be as in a run that was not killed, by name.
      statuses: its exit status after each signal; empty if it has no handlers of its own.
    """

    words: Callable[[Path], list[str]]
    outcome: Callable[[Path], dict[str, object]]
    statuses: dict[int, int]


def files(folder: Path) -> list[str]:
    """Returns the files of a run, but those of TensorBoard, which every start adds one to."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    arrays = {"d", "ocdbt.process_0"}  # files of arrays have random names
    return sorted(
        {
            str(path.parent if arrays & set(path.parts) else path)
            for path in found
            if not path.name.startswith("events.")
        }
    )


def is_done(folder: Path) -> bool:
    """Whether a quickstart has written everything. It does not start again in its folder."""
    return (folder / "run" / "summary.json").exists()


def loop_outcome(folder: Path) -> dict[str, object]:
    text = (folder / "out.txt").read_text()
    return {"end": text[text.index("end [") :], "files": files(folder / "run")}


def quickstart_outcome(folder: Path) -> dict[str, object]:
    from dora_jax.adapters import flatten
    from dora_jax.checkpoint import read_adapters

    run = folder / "run"
    adapters = flatten(read_adapters(run / "adapter").adapters)
    summary = json.loads((run / "summary.json").read_text())
    return {
        "adapters": {path: (x.dtype.name, x.tobytes()) for path, x in adapters.items()},
        "merged": (run / "merged" / "model.safetensors").read_bytes(),
        "metrics": (run / "metrics.jsonl").read_text(),
        "test": [summary["test_accuracy"], summary["test_loss"]],
        "files": files(run),
    }


def programs(checkpoint: Path) -> dict[str, Program]:
    settings = {
        "checkpoint": checkpoint,
        "train_examples": 320,
        "batch_size": 8,
        "epochs": 2,
        "checkpoint_every": 7,
        "max_length": 12,
        "dropout": 0.1,
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return {
        "quickstart": Program(
            lambda run: ["-m", "experiments.quickstart", f"--run-folder={run}", *options],
            quickstart_outcome,
            {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130},
        ),
        "loop": Program(lambda run: ["-c", LOOP, str(run)], loop_outcome, {}),
    }


def start(program: Program, folder: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a program, with its outputs in files of the folder."""
    folder.mkdir(exist_ok=True)
    with (folder / "out.txt").open("wb") as out, (folder / "errors.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, *program.words(folder / "run")],
            stdout=out,
            stderr=errors,
            env={**os.environ, **variables},
            cwd=REPOSITORY,
        )


def finish(program: Program, folder: Path, variables: dict[str, str]) -> float:
    """Runs a program to its end; returns the seconds that it took."""
    began = time.monotonic()
    status = start(program, folder, variables).wait()
    assert status == 0, (folder / "errors.txt").read_text()
    return time.monotonic() - began


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    problems = [name for name in one if name != "files" and one[name] != other[name]]
    return problems + sorted(set(one["files"]) ^ set(other["files"]))  # type: ignore[call-overload]


def kill(
    program: Program, folder: Path, moment: float, number: int, variables: dict[str, str]
) -> tuple[int, list[str]]:
    """Kills a program after some seconds; returns its status, and what is wrong with its end."""
    process = start(program, folder, variables)
    try:
        status = process.wait(moment)
        return status, [(folder / "errors.txt").read_text()] if status else []
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        status = process.wait()
    errors = (folder / "errors.txt").read_text()
    expected, problems = {0, program.statuses.get(number)}, []
    if is_done(folder):
        expected.add(-number)  # Python was ending, and had given its handlers back
    if program.statuses and status not in expected:
        problems.append(f"status {status}")
    if program.statuses and "Traceback" in errors:
        problems.append(errors)
    return status, problems


def main(seed: int, count: int, only: str | None) -> int:
    """Kills so often; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    draw, failures, killed = random.Random(seed), 0, collections.Counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        work = Path(name)
        variables = {
            "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
        }
        chosen = {
            k: p for k, p in programs(write_tiny_bert(work / "bert")).items() if only in (None, k)
        }
        seconds, expected = {}, {}
        for name, program in chosen.items():
            for attempt in ("first", "whole"):  # the first one fills the cache
                seconds[name] = finish(program, work / f"{name}-{attempt}", variables)
            expected[name] = program.outcome(work / f"{name}-whole")
            print(f"{name}: a whole run takes {seconds[name]:.1f} s", flush=True)
        number = 0
        while killed.total() < count:
            name = sorted(chosen, reverse=True)[number % len(chosen)]
            program, folder, number = chosen[name], work / f"{name}-{number}", number + 1
            for _ in range(min(draw.randrange(2, 7), count - killed.total())):
                sent, moment = draw.choice(SIGNALS), draw.uniform(0.05, seconds[name])
                status, problems = kill(program, folder, moment, sent, variables)
                failures += len(problems)
                killed[signal.Signals(sent).name] += status != 0
                print(
                    f"{name} {signal.Signals(sent).name} {moment:.2f} s: {problems or status}",
                    flush=True,
                )
                if status == 0 or is_done(folder):
                    break
            if not is_done(folder):
                finish(program, folder, variables)
            wrong = differences(program.outcome(folder), expected[name])
            failures += len(wrong)
            print(f"{name} ended: {wrong or 'as an unbroken run'}", flush=True)
    print(f"{dict(killed)}: {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", choices=["quickstart", "loop"])
    options = parser.parse_args()
    sys.exit(main(options.seed, options.count, options.only))
