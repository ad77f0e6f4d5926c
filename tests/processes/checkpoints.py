"""`python -m tests.processes.checkpoints save FOLDER`, and `restore` in place of `save`.

Each process has its own position in the data. Writes into the file FOLDER/said-PROCESS what a
restored run has: its step, its position, the largest number of an array, and the errors.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from experiments.trainer import distributed
from tests.processes.runs import mesh_of, put

CONFIG = dora.DoRAConfig(rank=4)
SHAPES = {"lora_a": (4096, 4), "lora_b": (4, 8), "magnitude": (8,)}


class Data:
    position = 0

    def get_state(self) -> Any:
        return {"next": self.position}

    def set_state(self, state: Any) -> None:
        self.position = state["next"]


def adapters(step: int) -> dict[str, Any]:
    """Returns adapters whose `lora_a` has a half in each of two processes."""
    mesh, rng = mesh_of(f"fsdp={len(jax.devices())}"), np.random.default_rng(step)
    return {
        "up": {
            name: put(
                rng.normal(size=shape).astype(np.float32),
                NamedSharding(mesh, P("fsdp") if name == "lora_a" else P()),
            )
            for name, shape in SHAPES.items()
        }
    }


def save(checkpoints: dora.Checkpoints) -> list[object]:
    data = Data()
    for step in (1, 2):
        data.position = 10 * step + jax.process_index()
        checkpoints.save(step, adapters(step), {"count": jnp.array(step)}, data=data)
    try:
        checkpoints.save(3, adapters(3), {"count": jnp.array(jax.process_index())})
    except dora.errors.AdapterError as error:
        return [error]
    return []


def restore(checkpoints: dora.Checkpoints) -> list[object]:
    said: list[object] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = checkpoints.restore(adapters(0), {"count": jnp.array(0)})
    said += [w.message for w in caught if "damaged" in str(w.message)]
    data = Data()
    try:
        checkpoints.restore(adapters(0), {"count": jnp.array(0)}, data=data)
    except dora.errors.CheckpointError as error:
        said.append(error)
    largest = np.asarray(jnp.max(run.adapters["up"]["lora_a"]))
    return [run.step, run.data, int(run.state["count"]), data.position, largest, *said]


def main(action: str, folder: str) -> None:
    with dora.Checkpoints(f"{folder}/run", CONFIG) as checkpoints:
        said = {"save": save, "restore": restore}[action](checkpoints)
    with open(f"{folder}/said-{jax.process_index()}", "w", encoding="utf-8") as file:
        print(*said, sep="\n", file=file)


if __name__ == "__main__":
    with distributed.start("Start it again."):
        main(*sys.argv[1:3])
