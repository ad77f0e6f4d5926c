"""Adapts LLaMA-7B without making an array; prints seconds and memory, as JSON.

A process of its own, `python -m experiments.benchmarks.abstract_model`, so that its peak memory is
that of this work alone.
"""

from __future__ import annotations

import json
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
    """Runs this module in a process of its own and returns what it printed.

    Args:
        scan_layers: Whether the layers are stacked: 7 kernels in place of 224.
    """
    command = [sys.executable, "-m", __spec__.name, *(["--scan"] if scan_layers else [])]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def adapt_7b(scan_layers: bool) -> dict[str, Any]:
    """Adapts every projection of an abstract LLaMA-7B, in this process."""
    model = nnx.eval_shape(
        lambda: Llama(
            LLAMA_7B,
            scan_layers=scan_layers,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
    )
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
    """The process's largest resident set so far, in GB of 10^9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) / 1e9


if __name__ == "__main__":
    print(json.dumps(adapt_7b("--scan" in sys.argv)))
