"""Measures how long a training step takes to trace and to compile, DoRA against LoRA.

The methods take turns in one process. Before each turn JAX forgets what it has traced, and the
persistent cache of compiled programs is off. The model is one of shapes, so nothing runs and no
weights are held. With the default settings it takes about four minutes on two CPU cores. Use a
quiet machine.

Examples:
    python -m experiments.benchmarks.compile_time
    python -m experiments.benchmarks.compile_time --layers 6 --methods lora dora dora-detached
    python -m experiments.benchmarks.compile_time --case llama-7b --scan-layers --target v5e:4x4 \
        --tokens 2048 --rank 32
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.ahead_of_time import fsdp_sharding, no_compilation_cache, target_mesh
from experiments.benchmarks.cases import LLAMA_7B, SMOLLM2_135M, Case, llama
from experiments.benchmarks.steps import METHODS, make_program
from experiments.benchmarks.timing import Times
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.run_folder import alone_in, finish_run, provenance

MODELS = {"smollm2": SMOLLM2_135M, "llama-7b": LLAMA_7B}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure how long a training step takes to trace and to compile."""

    # Any of smollm2, llama-7b.
    case: str = "smollm2"
    # Number of layers; the default is the model's.
    layers: int | None = None
    # Whether the model scans over its layers.
    scan_layers: bool = False
    # Rank of the adapters.
    rank: int = 16
    # Tokens of a text.
    tokens: int = 256
    # The methods; the first is what others are divided by.
    methods: tuple[str, ...] = ("lora", "dora")
    # cpu, or a TPU topology such as v5e:4x4, for which libtpu compiles without one. Kernels are cut
    # over its devices, which have a text each.
    target: str = "cpu"
    # Turns of each method.
    rounds: int = 3
    # Folder of the figures.
    run_folder: Path = Path("runs/compile_time")

    def __post_init__(self) -> None:
        if self.case not in MODELS:
            raise SystemExit(f"unknown case {self.case!r}: choose from {list(MODELS)}")
        for method in self.methods:
            if method not in METHODS:
                raise SystemExit(f"unknown method {method!r}: choose from {list(METHODS)}")
        if self.rounds < 1:
            raise SystemExit("rounds must be at least 1")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of one method.

    Attributes:
        trace: Seconds to trace the step and to write it as StableHLO.
        compile: Seconds in which XLA compiles that.
        operations: Number of StableHLO operations.
    """

    trace: float
    compile: float
    operations: int


def measure(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the figures of each method: seconds by round, medians, ratios to the first."""
    mesh = target_mesh(config.target)
    case = _case(config, mesh.size)
    turns: dict[str, list[Turn]] = {name: [] for name in config.methods}
    for number in range(config.rounds):
        for name in config.methods if number % 2 == 0 else reversed(config.methods):
            turn = _turn(case, name, mesh)
            turns[name].append(turn)
            print(f"  {METHODS[name].title}: {turn.trace:.1f} + {turn.compile:.1f} s", flush=True)
    first = _total(turns[config.methods[0]])
    found = {}
    for name, own in turns.items():
        ratio = _total(own).over(first)
        found[name] = {
            "title": METHODS[name].title,
            "trace_seconds": [turn.trace for turn in own],
            "compile_seconds": [turn.compile for turn in own],
            "operations": own[0].operations,
            "ratio": ratio.median,
            "ratio_quartiles": ratio.quartiles,
        }
    return found


def _total(turns: Sequence[Turn]) -> Times:
    return Times(tuple(turn.trace + turn.compile for turn in turns))


def _case(config: Config, devices: int) -> Case:
    """Returns the model in float32 on one device, in bfloat16 and rematerialised on several."""
    shape = MODELS[config.case]
    if config.layers is not None:
        shape = dataclasses.replace(shape, num_hidden_layers=config.layers)
    return llama(
        shape=shape,
        texts=devices,
        length=config.tokens,
        rank=config.rank,
        dtype=jnp.float32 if devices == 1 else jnp.bfloat16,
        scan_layers=config.scan_layers,
        remat=devices > 1,
    )


def _turn(case: Case, method: str, mesh: Any) -> Turn:
    """Traces and compiles the step of a method, as if it were the first in the process."""
    program = make_program(METHODS[method], case.abstract(), case.adapter, case.loss)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=fsdp_sharding(x, mesh)),
        (program.trainable, program.frozen, program.opt_state),
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), case.batch
    )
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(program.step).lower(*arguments, batch)
    traced = time.perf_counter()
    operations = len(re.findall(r"^ *%\S+ = ", lowered.as_text(), re.MULTILINE))
    begin = time.perf_counter()
    with no_compilation_cache():
        lowered.compile()
    return Turn(traced - start, time.perf_counter() - begin, operations)


def table(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table: medians over the rounds."""
    yield "| method | trace, s | compile, s | StableHLO operations | of the first | quartiles |"
    yield "|---|---|---|---|---|---|"
    for row in found.values():
        low, high = row["ratio_quartiles"]
        yield (
            f"| {row['title']} | {np.median(row['trace_seconds']):.2f} "
            f"| {np.median(row['compile_seconds']):.2f} | {row['operations']:,} "
            f"| {row['ratio']:.2f} | {low:.2f} to {high:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line, measures and prints."""
    config = settings(Config, __doc__, arguments)
    with in_one_line("Nothing is kept: start again."), alone_in(config.run_folder):
        found = measure(config)
        finish_run(config.run_folder, {"methods": found, "made": provenance()})
    print("\n".join(["", *table(found)]))


if __name__ == "__main__":
    main()
