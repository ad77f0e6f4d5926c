"""`python -m tests.processes.train FRONT_END FOLDER MESH STEPS`: trains to so many steps.

It starts from the newest checkpoint in FOLDER, and saves one after every second step. The first
process leaves the adapters in the file FOLDER/end-STEPS.npz, and prints the loss of each step. With
the variables `KILL_PROCESS` and `KILL_STEP`, that process kills itself after that step.
"""

from __future__ import annotations

import os
import signal
import sys

import jax
import numpy as np

from dora_jax.adapters import flatten
from dora_jax.processes import on_first_host
from experiments.trainer import distributed


def main(front_end: str, folder: str, mesh_text: str, steps: int) -> None:
    from tests.processes.runs import RUNS, batch, mesh_of

    mesh = mesh_of(mesh_text)
    run = RUNS[front_end](mesh)
    x, y = batch(mesh)
    with run.checkpoints(f"{folder}/checkpoints") as checkpoints:
        first = run.restore(checkpoints)
        say(f"start {first}")
        for step in range(first + 1, steps + 1):
            say(f"loss {step} {float(run.step(x, y))!r}")
            if step % 2 == 0:
                run.save_step(checkpoints, step)
            if step == int(os.environ.get("KILL_STEP", 0)):
                checkpoints.wait()
                if jax.process_index() == int(os.environ["KILL_PROCESS"]):
                    os.kill(os.getpid(), signal.SIGKILL)
    values = {".".join(path): on_first_host(x) for path, x in flatten(run.adapters).items()}
    if jax.process_index() == 0:
        np.savez(f"{folder}/end-{steps}.npz", **values)


def say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    with distributed.start("Start it again."):
        main(*sys.argv[1:4], int(sys.argv[4]))
