"""Measures DoRA on SmolLM2-135M by what its kernels lie in: bytes held, memory and time of a step.

Steps are taken in turn in one process, on the device that JAX finds, with random weights: they do
not change the time. On two CPU cores it takes about three minutes. Use a quiet machine.

Examples:
    python -m experiments.benchmarks.quantized_smollm2
    python -m experiments.benchmarks.quantized_smollm2 --bases bf16 nf4 --rounds 20
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import dora_jax as dora
from experiments.benchmarks.cases import SMOLLM2_135M, Base, Case, llama
from experiments.benchmarks.device_runs import compiled_step, time_columns
from experiments.benchmarks.steps import METHODS, make_program
from experiments.benchmarks.timing import time_in_turn
from experiments.models.llama_config import LlamaConfig
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.run_folder import alone_in, finish_run, provenance


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure DoRA on SmolLM2-135M by what its kernels lie in."""

    # bf16, nf4, int4, int8, fp8. The first is what others are divided by.
    bases: tuple[Base, ...] = ("bf16", "int8", "nf4")
    # Tokens of the batch, one text.
    tokens: int = 256
    # Rank of the adapters.
    rank: int = 16
    # Timed steps of each.
    rounds: int = 15
    # Folder of the figures.
    run_folder: Path = Path("runs/quantized_smollm2")


def measure(config: Config, shape: LlamaConfig = SMOLLM2_135M) -> dict[str, dict[str, Any]]:
    """Returns the figures of each base: bytes held, memory of a compiled step, its times."""
    case = llama(
        shape=shape,
        length=config.tokens,
        rank=config.rank,
        dtype=jnp.bfloat16,
        scan_layers=True,
    )
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Any] = {}
    for base in config.bases:
        calls[base], rows[base] = _step(case, base)
    times = time_in_turn(calls, rounds=config.rounds)
    for name, row in rows.items():
        ratio = times[name].over(times[config.bases[0]])
        row |= time_columns(times[name])
        row |= {"ratio": ratio.median, "ratio_quartiles": ratio.quartiles}
    return rows


def _step(case: Case, base: Base) -> tuple[Any, dict[str, Any]]:
    """Returns a compiled step on a base, and what it holds."""
    model = case.build()
    if base != "bf16":
        model = dora.quantize(model, base, target_modules=case.adapter.targets)
    program = make_program(METHODS["dora"], model, case.adapter, case.loss)
    call, row, _ = compiled_step(program, case.batch)
    held = sum(x.nbytes for x in jax.tree.leaves(program.frozen) if hasattr(x, "nbytes"))
    return call, {**row, "held_bytes": held}


def table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table."""
    yield "| kernels | MB held | MB of temporaries | ms a step | of the first | quartiles |"
    yield "|---|---|---|---|---|---|"
    for base, row in rows.items():
        low, high = row["ratio_quartiles"]
        yield (
            f"| {base} | {row['held_bytes'] / 1e6:.0f} | {row['temporary_bytes'] / 1e6:.0f} "
            f"| {1e3 * row['seconds']:.0f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line, measures and prints."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("Nothing is kept: start again."), alone_in(config.run_folder):
        rows = measure(config)
        finish_run(config.run_folder, {"bases": rows, "made": provenance()})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
