"""Several processes of one run on this machine, which find each other through a free port."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
      status: its exit status; negative for a signal.
      output: what it printed.
      errors: what it wrote to the standard error.
      ended: when, in seconds of `time.monotonic`.
    """

    status: int
    output: str
    errors: str
    ended: float


def start(module: str, *arguments: object, processes: int, devices: int) -> list[subprocess.Popen]:
    """Starts a module as so many processes, with so many CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "PYTHONFAULTHANDLER": "",
    }
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    own = [{"JAX_PROCESS_ID": str(i)} if processes > 1 else {} for i in range(processes)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in own
    ]


def wait(started: list[subprocess.Popen], seconds: float = 300) -> list[Ended]:
    """Waits until all processes have ended; those that have not by then are killed."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(len(started)) as pool:
        return list(pool.map(lambda one: _wait_for(one, deadline), started))


def _wait_for(one: subprocess.Popen, deadline: float) -> Ended:
    try:
        output, errors = one.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        one.kill()
        output, errors = one.communicate()
    return Ended(one.returncode, output, errors, time.monotonic())


def run(module: str, *arguments: object, processes: int = 2, devices: int = 2) -> list[str]:
    """Runs a module as so many processes; returns what each printed."""
    ended = wait(start(module, *arguments, processes=processes, devices=devices))
    assert not any(one.status for one in ended), "\n".join(one.errors[-3000:] for one in ended)
    return [one.output for one in ended]
