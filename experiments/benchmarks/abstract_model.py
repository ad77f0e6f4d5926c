"""Adapts a LLaMA-7B of shapes, without arrays, and prints seconds and memory as JSON.

It runs in a separate process, `python -m experiments.benchmarks.abstract_model`, so that the peak
memory of the process is that of this work alone.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import dora_jax as dora
from experiments.benchmarks.cases import LLAMA_7B
from experiments.models.llama import Llama


def measure_abstract(scan_layers: bool) -> dict[str, Any]:
    """Runs this module in a separate process and returns the figures that it prints.

    Args:
        scan_layers: Whether the layers are stacked. Then the model has 7 kernels instead of 224.
    """
    command = [sys.executable, "-m", __spec__.name, *(["--scan"] if scan_layers else [])]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def adapt_7b(scan_layers: bool) -> dict[str, Any]:
    """Adapts every projection of an abstract LLaMA-7B, in this process."""
    options: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    options["scan_layers"] = scan_layers
    model = nnx.eval_shape(lambda: Llama(LLAMA_7B, **options, rngs=nnx.Rngs(0)))
    before = _peak_gb()
    start = time.perf_counter()
    config = dora.DoRAConfig(rank=32, target_modules=r"layers\..*_proj")
    adapted = dora.apply_dora(model, config, rngs=nnx.Rngs(1))
    seconds = time.perf_counter() - start
    return {
        "scan_layers": scan_layers,
        "kernels": len(jax.tree.leaves(nnx.state(adapted, dora.DoRAParam))) // 3,
        "trainable_parameters": dora.adapters.count_parameters(dora.get_adapters(adapted))["total"],
        "seconds": seconds,
        "peak_gb": _peak_gb(),
        "peak_gb_before": before,
    }


def _peak_gb() -> float:
    """Returns the peak resident memory of the process, in GB of 10^9 bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage counts the process that this one was forked from, too
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e9


if __name__ == "__main__":
    print(json.dumps(adapt_7b("--scan" in sys.argv)))
