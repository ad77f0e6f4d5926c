"""Plans the training of a decoder on devices that are not there: does it fit, how long is a step?

The real training step of DoRA or LoRA in all linear layers but the head is compiled for the slice,
with shapes in place of weights. Printed are its memory on each device, its operations, its
collectives, an estimate of its time with what that assumes, and the largest batch.

For a TPU it needs libtpu (`pip install 'dora-jax[tpu-compile]'`), and no TPU.

Examples:
  python -m experiments.plan --model llama-7b --target v5e:4x4 --mesh fsdp=16
  python -m experiments.plan --model llama2-70b --target v5p:4x4x4 --mesh fsdp=16,tensor=4
  python -m experiments.plan --model llama-7b --target v5e:4x4 --mesh fsdp=16 --tokens 8192
  python -m experiments.plan --model llama-7b --base nf4 --target v5e:1x1 --mesh fsdp=1
  python -m experiments.plan --model smollm2-135m --target cpu --mesh fsdp=2 --layers 2 --json
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from experiments.benchmarks.cases import Base
from experiments.models.remat import REMAT, Remat
from experiments.planning.compiler import count
from experiments.planning.models import MODELS
from experiments.planning.program import PlanError, Setting
from experiments.planning.report import Plan, text_of
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.mesh import MeshError, parse_mesh

assert set(get_args(Remat)) == set(REMAT)


@dataclasses.dataclass(frozen=True)
class Config:
    """Plan a training step."""

    # llama-7b, llama-13b, llama2-70b, llama3-8b or smollm2-135m.
    model: str = "llama-7b"
    # A TPU topology, such as v5e:4x4, v5p:4x4x4 or v6e:8x8, or cpu.
    target: str = "v5e:4x4"
    # Devices of each axis: data (copies), fsdp (weights are cut), tensor (products are cut).
    mesh: str = "fsdp=16"
    # Tokens of a sequence.
    tokens: int = 2048
    # Sequences of each device of data and fsdp.
    rows: int = 1
    # What is trained.
    method: Literal["dora", "lora"] = "dora"
    # Rank of the adapters.
    rank: int = 32
    # Format of the adapted kernels: bf16, or a quantised one. Embedding and head are bf16.
    base: Base = "bf16"
    # What the backward pass keeps of each layer.
    remat: Remat = "save_scaled"
    # Layers of the model, if not all.
    layers: int | None = None
    # Compile a second program, of twice the rows (of one, if these do not fit), to find the
    # largest batch.
    largest_batch: bool = True
    # Print all figures as JSON.
    json: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise SystemExit(f"unknown model {self.model!r}: choose from {', '.join(MODELS)}")
        for name in ("tokens", "rows", "rank", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SystemExit(f"--{name} must be at least 1, not {value}")


def make_plan(config: Config, progress: Callable[[str], None]) -> Plan:
    """Compiles what a plan needs, and returns it.

    Raises:
        PlanError: The mesh does not fit the target or the model, or XLA fails.
        MeshError: The mesh is misspelt.
    """
    shape = MODELS[config.model]
    title = f"{config.model}, {config.layers or shape.num_hidden_layers} layers"
    if config.layers:
        shape = dataclasses.replace(shape, num_hidden_layers=config.layers)
    mesh = parse_mesh(config.mesh)
    setting = Setting(
        shape,
        config.method,
        config.tokens,
        config.rows,
        config.rank,
        remat=config.remat,
        base=config.base,
    )
    counts = count(setting, config.target, mesh, progress)
    plan = Plan(title, setting, config.target, mesh, counts, None)
    rows = 1 if plan.fits is False else 2 * config.rows
    if config.largest_batch and rows != config.rows:
        with_others = dataclasses.replace(setting, rows=rows)
        found = count(
            with_others, config.target, mesh, lambda text: progress(f"rows {rows}: {text}")
        )
        plan = dataclasses.replace(plan, other=(rows, found.memory.total))
    return plan


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line, plans and prints."""
    config = settings(Config, __doc__, arguments)
    start = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {text}", file=sys.stderr, flush=True)

    with in_one_line("Nothing is left behind."):
        try:
            plan = make_plan(config, progress)
        except (PlanError, MeshError) as error:
            raise SystemExit(str(error)) from None
        print(json.dumps(plan.to_dict(), indent=2) if config.json else text_of(plan))


if __name__ == "__main__":
    main()
