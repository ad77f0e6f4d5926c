"""Measures the cost of DoRA against LoRA, full fine-tuning and PEFT: time, memory, compiled work.

Steps of all methods are timed in turn in one process, on the device that JAX finds. With
`--target v5e:2x2`, programs are compiled for a TPU, and their operations and memory are counted.
No TPU is needed for that. The results folder gets a report in Markdown, the figures as JSON, and
plots. Figures of earlier commands stay in it unless this command measures them again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.benchmarks import peft_peer, scaling
from experiments.benchmarks.abstract_model import measure_abstract
from experiments.benchmarks.ahead_of_time import SHARDINGS, TABLES, Setting, measure_table
from experiments.benchmarks.cases import CASES
from experiments.benchmarks.device_runs import measure_inference, measure_training
from experiments.benchmarks.report import stamp, write_report
from experiments.benchmarks.steps import METHODS
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.run_folder import alone_in

Part = Literal["train", "inference", "scaling", "abstract"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the efficiency of DoRA."""

    # The parts to measure. The default is train, inference and abstract, or none with --target.
    parts: tuple[Part, ...] | None = None

    # --- Steps and inference calls ---

    # Any of mlp-512, mlp-2048, minilm, llama-7b, llama-7b-full-width, smollm2.
    cases: tuple[str, ...] = ("mlp-512", "mlp-2048", "minilm")
    # Methods to measure with one batch a step.
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "dora-hoisted")
    # Microbatches a step, for LoRA, DoRA and DoRA with precomputed scales; 0 leaves them out.
    microbatches: int = 8
    # Timed steps, or inference calls, of each method.
    rounds: int = 30
    # Time the same work in PEFT on torch, in the same rounds (needs the extra `parity`).
    peer: Literal["peft"] | None = None

    # Keep freed memory, for JAX and for PEFT (see `experiments/trainer/memory.py`).
    keep_freed_memory: bool = True

    # --- Compiling ahead of time ---

    # A TPU topology, such as v5e:2x2, v5p:2x2x1, v6e:2x2 (needs libtpu), or cpu.
    target: str | None = None
    # Tables to compile: no_remat, no_remat_traffic, remat, scan, microbatches. The default is all.
    tables: tuple[str, ...] = ()
    # Sharding of the frozen parameters: fsdp or replicated.
    sharding: str = "fsdp"
    # Number of blocks in a scan.
    layers: int = 8

    # Folder of the report.
    results_folder: Path = Path("runs/efficiency")

    def __post_init__(self) -> None:
        for name, given, known in (
            ("cases", self.cases, CASES),
            ("methods", self.methods, METHODS),
            ("tables", self.tables, TABLES),
            ("sharding", (self.sharding,), SHARDINGS),
        ):
            if unknown := set(given) - set(known):
                raise SystemExit(f"unknown {name} {sorted(unknown)}: choose from {list(known)}")

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """The parts to measure on this machine."""
        if self.parts is not None:
            return self.parts
        return () if self.target else ("train", "inference", "abstract")


def run(config: Config) -> str:
    """Measures, writes the report after each part, and returns its Markdown."""
    if config.target and not config.chosen_parts:
        jax.config.update("jax_platforms", "cpu")  # compiling needs no device
    if config.peer:
        peft_peer.check_installed()
        # Both libraries allocate memory on the same GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results = read_results(config.results_folder)
    text = ""
    for part, where, measure in _measurements(config):
        print(f"Measuring: {part}, {where}", flush=True)
        made = stamp()
        items = {name: {"stamp": made, **item} for name, item in measure().items()}
        results.setdefault(part, {}).setdefault(where, {}).update(items)
        text = write_report(results, config.results_folder)
    return text


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the figures of earlier commands in a results folder."""
    file = folder / "efficiency.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _measurements(config: Config) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yields each measurement: its part, its backend or target, and the function that measures.

    The function returns cases, curves, tables or models by name.
    """
    parts = config.chosen_parts
    backend = jax.default_backend() if parts else ""
    if "abstract" in parts:
        yield "abstract", "host", _abstract
    for case in config.cases:
        if "train" in parts:
            yield "train", backend, functools.partial(_train, config, case)
        if "inference" in parts:
            yield "inference", backend, functools.partial(_inference, config, case)
    if "scaling" in parts:
        for curve in scaling.CURVES:
            yield "scaling", backend, functools.partial(scaling.measure, curve, config.rounds)
    if config.target:
        setting = Setting(
            sharding=config.sharding, layers=config.layers, microbatches=config.microbatches or 1
        )
        for table in config.tables or TABLES:
            measure = functools.partial(measure_table, table, config.target, setting)
            yield "ahead_of_time", config.target, measure


def _train(config: Config, name: str) -> dict[str, Any]:
    case, variants = CASES[name](), list(config.methods)
    if config.microbatches:
        variants += [f"{m}/{config.microbatches}" for m in ("lora", "dora", "dora-hoisted")]
    peers = peft_peer.training_steps(case) if config.peer else {}
    rows = measure_training(case, variants, rounds=config.rounds, peers=peers)
    return {name: {"title": case.title, "rounds": config.rounds, "rows": rows}}


def _inference(config: Config, name: str) -> dict[str, Any]:
    case = CASES[name]()
    rows = measure_inference(case, rounds=config.rounds)
    return {name: {"title": case.title, "rounds": config.rounds, "rows": rows}}


def _abstract() -> dict[str, Any]:
    models = {"layers apart": False, "layers stacked": True}
    return {name: measure_abstract(scan) for name, scan in models.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    config = settings(Config, __doc__, arguments)
    if config.keep_freed_memory:
        keep_freed_memory()
    hint = "The report has all measurements that were finished."
    with in_one_line(hint), alone_in(config.results_folder):
        print(run(config))


if __name__ == "__main__":
    main()
