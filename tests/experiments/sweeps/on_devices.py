"""Prints how far members on two devices are from each alone, and where their arrays lie."""

import json

import jax
import numpy as np

from experiments.sweeps.members import Member
from experiments.sweeps.program import Programs, Schedule
from experiments.sweeps.stack import Stack
from tests.experiments.sweeps.tiny_sweep import tiny_sweep_task

STEPS = 3


def losses(programs, task, members):
    state, found = programs.start(members), []
    data = [task.batches(member.seed, member.batch_size) for member in members]
    for _ in range(STEPS):
        state, outcomes = programs.step(state, members, [next(own) for own in data])
        found.append(np.asarray(outcomes.loss))
    outputs = programs.predict(state, members, task.eval_batches("validation"))
    return state, np.array(found), outputs


def main() -> None:
    task = tiny_sweep_task()
    members = [Member(rank=2, alpha=4.0, batch_size=4, learning_rate=1e-2, seed=s) for s in (0, 1)]
    programs = Programs(Stack(task, members), Schedule(steps=STEPS))
    state, together, outputs = losses(programs, task, members)
    alone = [losses(programs, task, [member])[1:] for member in members]
    report = {
        "devices": jax.device_count(),
        "arrays": sorted({len(x.sharding.device_set) for x in jax.tree.leaves(state)}),
        "loss": float(np.max(np.abs(together / np.concatenate([x for x, _ in alone], 1) - 1))),
        "outputs": float(np.max(np.abs(outputs - np.concatenate([y for _, y in alone])))),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
