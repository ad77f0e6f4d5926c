"""What is measured on a GPU: steps, inference calls, many members in one program, kernels.

Each function returns rows by name, with times of one process taken in turn.
"""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

import dora_jax as dora
from experiments.benchmarks import peft_peer
from experiments.benchmarks.device_runs import (
    compiled_call,
    compiled_step,
    measure_device_memory,
    perturbed,
    time_columns,
)
from experiments.benchmarks.steps import METHODS, Program, make_program
from experiments.benchmarks.timing import Times, time_in_turn

if TYPE_CHECKING:
    from experiments.benchmarks.cases import Case

    Row = dict[str, Any]
    Calls = dict[str, Callable[[], Any]]

STEPS = 4
"""Steps that a call takes before it waits."""

_OVER = ("lora", "lora-by-hand", "peft-dora", "peft-lora")


def training(
    case: Case,
    methods: tuple[str, ...],
    peers: dict[str, Any],
    *,
    rounds: int,
    texts: dict[str, str],
) -> dict[str, Row]:
    """Times training steps of the library and of its peers.

    Args:
        case: The model and its batch.
        methods: Names in `METHODS`.
        peers: Steps of other libraries, `STEPS` of them a call.
        rounds: Number of timed calls of each.
        texts: Receives the compiled program of each method, and on a GPU its profile.
    """
    model, rows, calls = case.build(), {}, {}
    for name in methods:
        program = make_program(METHODS[name], model, case.adapter, case.loss)
        calls[name], rows[name], compiled = compiled_step(program, case.batch, STEPS)
        texts[f"{name}.hlo"] = compiled.as_text()
        rows[name] |= {"title": METHODS[name].title, "kernels": kernels(texts[f"{name}.hlo"])}
    measure_device_memory(rows, calls)
    rows |= _peer_rows(peers)
    rows = _timed({**calls, **peers}, rows, case, rounds, STEPS)
    if jax.default_backend() == "gpu":
        texts |= {f"{name}.profile": profile(call) for name, call in {**calls, **peers}.items()}
    return rows


def inference(case: Case, peers: dict[str, Any], *, rounds: int) -> dict[str, Row]:
    """Times forward passes: the base, LoRA, DoRA as it is, with precomputed scales, and merged."""
    base = case.build()
    lora, adapted = (
        perturbed(METHODS[name].adapt(base, case.adapter, seed=1)) for name in ("lora", "dora")
    )
    models = {
        "base": ("base model", base),
        "lora": ("LoRA", lora),
        "dora": ("DoRA, norm in every call", adapted),
        "dora-precomputed": ("DoRA, scales precomputed", dora.precompute_scales(adapted)),
        "merged": ("DoRA, merged", dora.merge(adapted)),
    }
    calls: Calls = {}
    rows: dict[str, Row] = {}
    for name, (title, model) in models.items():
        calls[name], rows[name], compiled = compiled_call(case, model)
        rows[name] |= {"title": title, "kernels": kernels(compiled.as_text())}
    measure_device_memory(rows, calls)
    rows |= _peer_rows(peers)
    return _timed({**calls, **peers}, rows, case, rounds, 1)


def members(case: Case, count: int, *, rounds: int) -> dict[str, Row]:
    """Times a step of `count` adapters over one frozen base in one program, and of one adapter."""
    one = make_program(METHODS["dora"], case.build(), case.adapter, case.loss)
    stacked = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * count))
    step = jax.vmap(one.step, in_axes=(0, None, 0, None))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one.opt_state)
    many = Program(step, stacked(one.trainable), one.frozen, state)
    rows, calls = {}, {}
    for name, program in {"one": one, "many": many}.items():
        calls[name], rows[name], compiled = compiled_step(program, case.batch, STEPS)
        rows[name]["kernels"] = kernels(compiled.as_text())
    rows["one"]["title"] = "DoRA, one member"
    rows["many"]["title"] = f"DoRA, {count} members in one program"
    measure_device_memory(rows, calls)
    times = time_in_turn(calls, rounds=rounds, steps=STEPS)
    for name, row in rows.items():
        row |= time_columns(times[name])
    ratio = times["many"].over(times["one"])
    name = f"{count} steps of one"
    rows["many"]["over"] = {name: _quotient(ratio.median, ratio.quartiles, count)}
    return rows


def kernels(text: str) -> dict[str, int]:
    """Counts what a compiled GPU program starts, by kind.

    Args:
        text: The optimised program, `compiled.as_text()`.

    Returns:
        The number of products by cuBLAS (`gemm`), products that XLA fused with their neighbours
        (`fused gemm`), other fusions (`fusion`) and other calls.

    Example:
        >>> text = '''
        ... %f (q: f32[2]) -> f32[2] {
        ...   ROOT %c = f32[2] fusion(%q), kind=kLoop, calls=%inside
        ... }
        ... ENTRY %main (p: f32[2]) -> f32[2] {
        ...   %a = f32[2] fusion(%p), kind=kLoop, calls=%f
        ...   ROOT %b = f32[2] custom-call(%a), custom_call_target="__cublas$gemm"
        ... }'''
        >>> kernels(text)
        {'fusion': 1, 'gemm': 1}
    """
    fused = set(re.findall(r" fusion\(.*calls=(%[^\s,]+)", text))
    found: Counter[str] = Counter()
    inside = False
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            inside = line.split()[0] in fused
        elif inside:
            continue
        elif match := re.search(r'custom_call_target="([^"]*)"', line):
            found["gemm" if "cublas" in match[1] else match[1]] += 1
        elif " fusion(" in line:
            product = "gemm_fusion" in line or "__triton_gemm" in line
            found["fused gemm" if product else "fusion"] += 1
    return dict(sorted(found.items()))


def profile(call: Callable[[], Any]) -> str:
    """Returns the seconds of each kernel of a call, JAX's too, by torch's profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as traced

    with traced(activities=[ProfilerActivity.CUDA]) as found:
        call()
    return found.key_averages().table(
        sort_by="cuda_time_total", row_limit=60, max_name_column_width=90
    )


def ceilings(*, size: int = 8192, copied: int = 2**31) -> dict[str, float]:
    """Measures the device's rates: TFLOP/s of a bfloat16 product, TB/s of a copy, read and write.

    Args:
        size: Rows and columns of the matrices.
        copied: Bytes of the array that is copied.
    """
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    z = jax.random.normal(jax.random.key(2), (copied // 4,), jnp.float32)

    def seconds(f: Callable[..., Any], *arguments: Any, repeats: int = 10) -> float:
        compiled = jax.jit(f)
        jax.block_until_ready(compiled(*arguments))
        start = time.perf_counter()
        for _ in range(repeats):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / repeats

    product = 2 * size**3 / seconds(lambda x, y: x @ y, x, y) / 1e12
    copy = 2 * z.nbytes / seconds(lambda z: z + 1.0, z) / 1e12
    return {"bfloat16 product, TFLOP/s": product, "copy, TB/s": copy}


def _peer_rows(peers: Mapping[str, Any]) -> dict[str, Row]:
    """Returns a row for each peer: the peak of its arguments and what torch allocates in a call."""
    rows: dict[str, Row] = {}
    for name, call in peers.items():
        rows[name] = {"title": call.title, "compile_seconds": call.warm_up()}
        if (temporary := peft_peer.temporary_bytes(call)) is not None:
            rows[name]["peak_bytes"] = temporary + call.argument_bytes
    return rows


def _timed(calls: Calls, rows: dict[str, Row], case: Case, rounds: int, steps: int) -> Any:
    times = time_in_turn(calls, rounds=rounds, steps=steps)
    for name, row in rows.items():
        row |= time_columns(times[name])
        row["tokens_per_second"] = case.tokens / times[name].median
        row["over"] = _ratios(times, name)
    return rows


def _ratios(times: Mapping[str, Times], name: str) -> dict[str, Any]:
    """Returns the ratios, round by round, to the methods that others are compared with."""
    found = {other: times[name].over(times[other]) for other in _OVER if other in times}
    return {
        other: {"median": ratio.median, "quartiles": ratio.quartiles}
        for other, ratio in found.items()
        if other != name
    }


def _quotient(median: float, quartiles: tuple[float, float], by: int) -> dict[str, Any]:
    return {"median": median / by, "quartiles": tuple(x / by for x in quartiles)}
