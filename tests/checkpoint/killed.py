"""A run that is killed again and again, and started again each time.

`python -m tests.checkpoint.killed FOLDER KILLS STEPS` prints a line for each start and each save,
and fails unless the last of the killed runs ends with the values of one that was never killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import jax.numpy as jnp
import numpy as np
from flax import nnx

import dora_jax as dora
from dora_jax.adapters import flatten

CONFIG = dora.DoRAConfig(rank=2, dropout=0.1)


class Data:
    """Batches that are a function of the position."""

    position = 0

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def __next__(self):
        self.position += 1
        return np.random.default_rng(self.position).normal(size=(3, 6)).astype(np.float32)


@nnx.jit
def train_step(model, optimizer, x):
    def loss_fn(model):
        return jnp.mean((model(x) - 1) ** 2)

    optimizer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, dora.DoRAParam))(model))


def run(folder, steps, every, say):
    base = nnx.Linear(6, 4, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    model = dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)
    data = Data()
    with dora.Checkpoints(folder, CONFIG, best="loss") as checkpoints:
        restored = checkpoints.restore(model, optimizer, data=data)
        first = restored.step if restored else 0
        say(f"start {first}")
        for number in range(first + 1, steps + 1):
            train_step(model, optimizer, next(data))
            if number % every == 0:
                checkpoints.save(number, model, optimizer, data=data, metrics={"loss": 1 / number})
                say(f"saving {number}")
    values = nnx.state(model, dora.DoRAParam), nnx.state(optimizer), data.position
    say(f"end {[np.asarray(x).tolist() for x in flatten(values).values()]}")


def start(*args):
    """Starts a run in a process of its own; returns its number and the lines that it says.

    It is forked before JAX starts a backend, which saves it the imports.
    """
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, os.fdopen(reader)
    try:
        run(*args, lambda line: os.write(writer, f"{line}\n".encode()))
    finally:
        os._exit(0)


def main(folder, kills, steps):
    rng = random.Random(0)
    _, lines = start(f"{folder}/unbroken", steps, steps)
    unbroken = lines.read().splitlines()[-1]
    for _ in range(kills):
        pid, lines = start(f"{folder}/killed", steps, 3)
        for _ in range(rng.randrange(1, 6)):
            print(lines.readline().strip(), flush=True)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the run had ended before it was killed"
    _, lines = start(f"{folder}/killed", steps, 3)
    ended = lines.read().splitlines()
    print(ended[0])
    assert unbroken.startswith("end") and ended[-1] == unbroken, (ended[-1], unbroken)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
