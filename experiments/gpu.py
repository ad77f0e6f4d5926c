"""Measures DoRA on a GPU in a few minutes, against LoRA and PEFT, and leaves one table.

It needs what an image for CUDA usually holds: jax, flax, optax, orbax-checkpoint, chex, torch,
transformers and peft; and tyro with docstring-parser and typeguard, which are Python alone, so that
their wheels can be carried to a machine without a network. Parts run in the order of their weight.
A part that no longer fits into the time is left out, and the table says so. On a machine without a
GPU everything is small: that only shows that it runs.

    python -m experiments.gpu --minutes 8 --results-folder runs/gpu
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# PEFT allocates on the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import tyro

from experiments.benchmarks import gpu, peft_peer
from experiments.benchmarks.cases import LLAMA_7B, BlocksShape, Case, blocks
from experiments.benchmarks.gpu_table import write_table

_METHODS = ("lora", "dora", "lora-by-hand", "dora-detached", "dora-hoisted")
_TESTS = ("tests/decomposition", "tests/ops", "tests/layers", "tests/nnx", "tests/linen")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure DoRA on a GPU."""

    # Minutes in all. Parts that no longer fit are left out.
    minutes: float = 8.0
    # Names of parts to run, such as train-2048-32; the default is all.
    parts: tuple[str, ...] = ()
    # Timed calls of each method.
    rounds: int = 12
    # Blocks of the model.
    layers: int = 2
    # Processes that run the tests.
    jobs: int = 12
    # Folder of the table, the figures and the compiled programs.
    results_folder: Path = Path("runs/gpu")


@dataclasses.dataclass
class Part:
    """Something to measure: a name, a title, and the function that returns its rows."""

    name: str
    title: str
    measure: Callable[[], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts in turn, and writes the table after each."""
    config = tyro.cli(Config, description=__doc__, args=arguments)
    end = time.monotonic() + 60 * config.minutes
    config.results_folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    slowest = 0.0
    for part in _chosen(config, end):
        start = time.monotonic()
        if end - start < 0.8 * slowest:
            results[part.name] = {"title": part.title, "left_out": "no time left"}
            print(f"{part.name}: left out, no time", flush=True)
            continue
        results[part.name] = {"title": part.title, **_measured(part)}
        seconds = time.monotonic() - start
        if part.name.startswith("train"):
            slowest = seconds
        results[part.name]["seconds"] = seconds
        left = (end - time.monotonic()) / 60
        print(f"{part.name}: {seconds:.0f} s, {left:.1f} minutes left", flush=True)
        (config.results_folder / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        text = write_table(results, config.results_folder)
        gc.collect()
    print(text)


def _measured(part: Part) -> dict[str, Any]:
    """Returns the rows of a part, or the error that ended it: the others are still of use."""
    try:
        return part.measure()
    except Exception as error:
        print(f"{part.name}: {type(error).__name__}: {error}"[:2000], flush=True)
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _chosen(config: Config, end: float) -> Iterator[Part]:
    known = list(_parts(config, end))
    if unknown := set(config.parts) - {part.name for part in known}:
        raise SystemExit(
            f"unknown parts {sorted(unknown)}: choose from {[part.name for part in known]}"
        )
    return (part for part in known if not config.parts or part.name in config.parts)


def _parts(config: Config, end: float) -> Iterator[Part]:
    def train(tokens: int, rank: int, methods: tuple[str, ...] = ("lora", "dora")) -> Part:
        case = _case(config, tokens, rank)
        return Part(
            f"train-{tokens}-{rank}",
            f"Training step: {case.title}",
            functools.partial(_training, config, case, methods),
        )

    first = _case(config, 2048, 32)
    yield Part("ceilings", "The device's rates", _ceilings)
    yield train(2048, 32, _METHODS)
    yield Part(
        "inference-2048-32",
        f"Forward pass: {first.title}",
        lambda: {"rows": gpu.inference(first, _peers(first, False), rounds=config.rounds)},
    )
    yield train(8192, 32)
    yield train(2048, 384)
    yield Part("tests", "Tests of the core on the GPU", functools.partial(_tests, config, end))
    yield train(8192, 384)
    yield train(2048, 16)
    yield train(8192, 16)
    yield Part(
        "members",
        f"Training step: {first.title}",
        lambda: {"rows": gpu.members(first, 8, rounds=config.rounds)},
    )
    yield Part(
        "torch-compile",
        f"Training step: {first.title}",
        functools.partial(_compiled, config, first),
    )


def _case(config: Config, tokens: int, rank: int) -> Case:
    sizes: dict[str, Any] = dataclasses.asdict(LLAMA_7B)
    del sizes["model_type"]
    sizes |= {"num_hidden_layers": config.layers, "vocab_size": 1024}
    if jax.default_backend() != "gpu":
        tokens, rank = tokens // 64, rank // 8
        sizes |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return blocks(BlocksShape(**sizes), tokens=tokens, rank=rank, dtype="bfloat16")


def _peers(case: Case, training: bool) -> dict[str, Any]:
    if training:
        return dict(peft_peer.training_steps(case, gpu.STEPS))
    return dict(peft_peer.inference_calls(case))


def _training(config: Config, case: Case, methods: tuple[str, ...]) -> dict[str, Any]:
    texts: dict[str, str] = {}
    peers = _peers(case, True)
    rows = gpu.training(case, methods, peers, rounds=config.rounds, texts=texts)
    if methods == _METHODS:
        file = config.results_folder / "programs.json.gz"
        file.write_bytes(gzip.compress(json.dumps(texts).encode()))
    return {"rows": rows}


def _compiled(config: Config, case: Case) -> dict[str, Any]:
    """PEFT under `torch.compile`, beside the library's DoRA."""
    peers: dict[str, Any] = {
        f"peft-{method}": peft_peer.TorchStep(case, method, steps=gpu.STEPS, compile_model=True)
        for method in peft_peer.METHODS
    }
    return {"rows": gpu.training(case, ("lora", "dora"), peers, rounds=config.rounds, texts={})}


def _ceilings() -> dict[str, Any]:
    small = jax.default_backend() != "gpu"
    figures = gpu.ceilings(size=256, copied=2**20) if small else gpu.ceilings()
    return {"figures": figures}


def _tests(config: Config, end: float) -> dict[str, Any]:
    """Runs the core's default tests with float32 products in full, as long as there is time.

    On a GPU a float32 product is rounded to TF32 by default, which is no law of the library.
    """
    environment = os.environ | {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.04",
    }
    folder = config.results_folder.resolve()
    small = jax.default_backend() != "gpu"
    paths = ("tests/decomposition/test_scale.py",) if small else _TESTS
    jobs = 0 if small else config.jobs
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "--tb=short", "-rf", *paths]
    log = folder / "tests.log"
    seconds = max(30.0, min(150.0, end - time.monotonic()))
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"lines": [lines[-1] if lines else "no output", *failed[:30]], "count": len(failed)}


if __name__ == "__main__":
    main()
