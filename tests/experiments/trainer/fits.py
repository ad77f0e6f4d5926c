"""Runs of `fit` on the tiny task, for tests in this process and in others.

`python -m tests.experiments.trainer.fits FOLDER MESH MICROBATCHES` trains in a folder and prints
the adapters. With a coordinator's ADDRESS and an INDEX it is one of two processes; they train again
in another folder, where the second one gets SIGTERM in step 4, and print the step that was saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
from flax import nnx
from jax.experimental import multihost_utils

import dora_jax as dora
from experiments.tasks.text import train_batches
from experiments.trainer.classification import Schedule, classifier_training
from experiments.trainer.loop import fit
from experiments.trainer.placement import own_rows, place
from experiments.trainer.settings import TrainerSettings
from experiments.trainer.signals import InterruptedStepError
from tests.experiments.tiny_task import tiny_task

SCHEDULE = Schedule(1e-2, epochs=2, batch_size=4, checkpoint_every=3)
CONFIG = dora.DoRAConfig(rank=2, modules_to_save=["classifier"])
# One optimiser for all runs: a step of a new one is compiled again.
TX = dora.dora_optimizer(SCHEDULE.over(10))
TASK = tiny_task()


def adapted():
    model = dora.apply_dora(TASK.model(0), CONFIG, rngs=nnx.Rngs(2))
    return model, nnx.Optimizer(model, TX, wrt=dora.DoRAParam)


def training(model, optimizer, task=TASK, settings=None, **changes):
    """What `fit` takes for ten steps of the tiny task."""
    settings = settings or TrainerSettings()
    made = classifier_training(model, optimizer, task, SCHEDULE, settings, config=CONFIG)
    return dataclasses.replace(made, **changes)


def run(folder, settings=None, **changes):
    """Trains in a folder, from its newest checkpoint on if it has one."""
    model, optimizer = adapted()
    return model, fit(training(model, optimizer, settings=settings, **changes), folder, settings)


class CallingBatches:
    """The batches of the tiny task; calls a function before it gives the n-th one."""

    def __init__(self, at, call, rows=slice(None)):
        tokens, labels = TASK.train.tokens, TASK.train.labels
        self._batches = train_batches(tokens, labels, SCHEDULE.batch_size, seed=0, rows=rows)
        self._at, self._call = at, call

    def __next__(self):
        if self.get_state()["next_index"] == self._at - 1:
            self._call()
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def adapters(model):
    """The arrays of a model's adapters by path, as lists."""
    tree = multihost_utils.process_allgather(dora.get_adapters(model), tiled=True)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.tolist() for path, leaf in leaves}


def check_placed(model, mesh):
    """Checks that the steps left every array where it was placed."""
    fresh = adapted()
    place(*fresh, mesh)
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, fresh[0])), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def main():
    folder, mesh, microbatches, *process = sys.argv[1:]
    if process:
        jax.distributed.initialize(process[0], 2, int(process[1]))
    settings = TrainerSettings(mesh=mesh, microbatches=int(microbatches))
    saved = {"config": CONFIG} if not process else {"config": None, "best": None}
    model, _ = run(Path(folder), settings, **saved)
    check_placed(model, settings.device_mesh())
    print(json.dumps(adapters(model)))
    if process:

        def terminate():
            if jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        batches = CallingBatches(4, terminate, own_rows(settings.device_mesh(), 4))
        try:
            run(Path(f"{folder}-stopped"), settings, best=None, batches=batches)
        except InterruptedStepError as interrupted:
            print(interrupted.number, interrupted.saved_step)


if __name__ == "__main__":
    main()
