"""`python -m tests.processes.memory FOLDER`: saves adapters of a 70B model, an eighth as wide.

Adapters and both moments are cut over the devices. Each process leaves in the file FOLDER-PROCESS,
in bytes, what its devices hold, what it wrote, and by how much its memory rose while it saved and
while it restored.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from experiments.trainer import distributed
from tests.processes.runs import mesh_of

LAYERS, RANK = 80, 32
WIDTHS = {"q": (1024, 1024), "k": (1024, 128), "gate": (1024, 3584), "down": (3584, 1024)}


def main(folder: str) -> None:
    mesh = mesh_of(f"fsdp={len(jax.devices())}")
    trees = [adapters(mesh, seed) for seed in range(3)]
    leaves = jax.tree.leaves(trees)
    own = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
    config = dora.DoRAConfig(rank=RANK)
    with dora.Checkpoints(folder, config) as checkpoints:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        checkpoints.save(1, trees[0], {"mu": trees[1], "nu": trees[2]})
        checkpoints.wait()
        rose = [memory("VmHWM") - before]
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        checkpoints.restore(trees[0], {"mu": trees[1], "nu": trees[2]})
        rose.append(memory("VmHWM") - before)
    files = Path(folder).glob(f"1/arrays/ocdbt.process_{jax.process_index()}/**/*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    words = own, written, *rose
    Path(f"{folder}-{jax.process_index()}").write_text(" ".join(map(str, words)))


def adapters(mesh: jax.sharding.Mesh, seed: int) -> dict[str, dict[str, jax.Array]]:
    def draw(n: int, shape: tuple[int, ...], spec: P) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        key = jax.random.key(17 * seed + n)
        return jax.jit(jax.random.normal, static_argnums=1, out_shardings=sharding)(key, shape)

    return {
        name: {
            "lora_a": draw(3 * i, (LAYERS, inner, RANK), P(None, "fsdp")),
            "lora_b": draw(3 * i + 1, (LAYERS, RANK, outer), P(None, None, "fsdp")),
            "magnitude": draw(3 * i + 2, (LAYERS, outer), P(None, "fsdp")),
        }
        for i, (name, (inner, outer)) in enumerate(WIDTHS.items())
    }


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status).group(1))


if __name__ == "__main__":
    with distributed.start("Start it again."):
        main(sys.argv[1])
