"""Times training steps and inference calls on the device that JAX finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dora_jax as dora
from experiments.benchmarks.steps import METHODS, Program, make_program
from experiments.benchmarks.timing import Times, time_in_turn

if TYPE_CHECKING:
    from experiments.benchmarks.cases import Case

    Calls = dict[str, Callable[[], Any]]
    Row = dict[str, Any]

# After a step, the OpenMP threads of torch keep the cores busy for some milliseconds.
PAUSE_BESIDE_PEERS = 0.05


def measure_training(
    case: Case,
    variants: Sequence[str],
    *,
    rounds: int,
    peers: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Row]:
    """Times training steps of all variants, one of each in every round.

    Args:
        case: The model and its batch.
        variants: Names in `METHODS`, with `/k` for k microbatches: `"dora-hoisted/8"`.
        rounds: Timed steps of each variant.
        peers: Steps of other libraries, timed in the same rounds.

    Returns:
        A row for each variant: times, memory, counts, and the ratio to LoRA with as many
        microbatches, if that was timed. A row for each peer has the times only.
    """
    model, rows, calls = case.build(), {}, {}
    for variant in variants:
        method, microbatches = split_variant(variant)
        program = make_program(
            METHODS[method], model, case.adapter, case.loss, microbatches=microbatches
        )
        calls[variant], rows[variant], _ = compiled_step(program, case.batch)
        suffix = f", {microbatches} microbatches" if microbatches > 1 else ""
        rows[variant]["title"] = METHODS[method].title + suffix
    measure_device_memory(rows, calls)
    pause = PAUSE_BESIDE_PEERS if peers else 0.0
    times = time_in_turn({**calls, **(peers or {})}, rounds=rounds, pause=pause)
    for variant, row in rows.items():
        row |= time_columns(times[variant])
        row["tokens_per_second"] = case.tokens / times[variant].median
        row["loss"] = float(calls[variant]())
        if not np.isfinite(row["loss"]):
            raise FloatingPointError(
                f"{variant} diverged: after the timed steps the loss is not finite"
            )
        row |= _training_ratios(variant, times)
    for peer, step in (peers or {}).items():
        rows[peer] = {"title": peer, **time_columns(times[peer])}
        rows[peer]["tokens_per_second"] = case.tokens / times[peer].median
        rows[peer]["trainable_parameters"] = getattr(step, "trainable_parameters", None)
        rows[peer] |= _training_ratios(peer, times)
    return rows


def _training_ratios(variant: str, times: Mapping[str, Times]) -> Row:
    """Returns the ratios of a variant to the variants that it is compared with.

    Variants of a peer are named `peer-method`. Its DoRA is compared with its LoRA.
    """
    method, _, microbatches = variant.partition("/")
    peer = method.partition("-")[0]
    lora = f"{peer}-lora" if f"{peer}-lora" in times else "lora"
    ratios: Row = {}
    if (reference := f"{lora}/{microbatches}" if microbatches else lora) in times:
        ratios["over_lora"] = _ratio(times[variant], times[reference])
    if variant in ("lora", "dora", "dora-detached") and "lora-by-hand" in times:
        ratios["over_by_hand"] = _ratio(times[variant], times["lora-by-hand"])
    if others := [name for name in times if name.endswith(f"-{variant}")]:
        ratios["over_peer"] = {name: _ratio(times[variant], times[name]) for name in others}
    return ratios


def measure_inference(case: Case, *, rounds: int) -> dict[str, Row]:
    """Times inference calls of the base, of LoRA and of DoRA, one of each in every round.

    DoRA is timed with its norm computed in every call, with precomputed scales
    (`dora.precompute_scales`), and merged into the kernels.

    Returns:
        A row for each variant: times, the ratios to LoRA and to the base, and whether two calls
        gave the same bits.
    """
    base = case.build()
    by_hand = perturbed(METHODS["lora-by-hand"].adapt(base, case.adapter, seed=1))
    lora = perturbed(METHODS["lora"].adapt(base, case.adapter, seed=1))
    adapted = perturbed(METHODS["dora"].adapt(base, case.adapter, seed=1))
    models = {
        "base": ("base model", base),
        "merged": ("DoRA, merged", dora.merge(adapted)),
        "lora-by-hand": ("LoRA, written by hand", by_hand),
        "lora": ("LoRA", lora),
        "dora-frozen-scale": ("DoRA, scale frozen", dora.precompute_scales(adapted)),
        "dora": ("DoRA, norm in every call", adapted),
    }
    rows: dict[str, Row] = {}
    calls: Calls = {}
    for name, (title, model) in models.items():
        call, rows[name], _ = compiled_call(case, model)
        rows[name]["title"] = title
        rows[name]["repeats_bit_for_bit"] = bool(np.array_equal(call(), call()))
        calls[name] = call
    measure_device_memory(rows, calls)
    times = time_in_turn(calls, rounds=rounds)
    for name, row in rows.items():
        row |= time_columns(times[name])
        row["tokens_per_second"] = case.tokens / times[name].median
        row["over_lora"] = _ratio(times[name], times["lora"])
        row["over_base"] = _ratio(times[name], times["base"])
        if row["flops"] and rows["base"]["flops"]:
            row["flops_over_base"] = row["flops"] / rows["base"]["flops"]
    return rows


def split_variant(variant: str) -> tuple[str, int]:
    """Returns the method and the number of microbatches.

    Example:
        >>> split_variant("dora-hoisted/8"), split_variant("lora")
        (('dora-hoisted', 8), ('lora', 1))
    """
    method, _, microbatches = variant.partition("/")
    return method, int(microbatches or 1)


def compiled_figures(compiled: Any) -> Row:
    """Returns XLA's counts for a compiled program, per device.

    They are floating point operations, bytes accessed, and bytes of temporaries, arguments and
    results. The peak is the sum of these, as if all temporaries existed at the same time.
    """
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    temporary, arguments = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "flops": costs.get("flops"),
        "bytes_accessed": costs.get("bytes accessed"),
        "temporary_bytes": temporary,
        "argument_bytes": arguments,
        "peak_bytes": temporary + arguments + results,
        "peak_source": "compiled program",
    }


def compiled_step(
    program: Program, batch: Any, steps: int = 1
) -> tuple[Callable[[], Any], Row, Any]:
    """Compiles a training step.

    Args:
        program: The step, and its arrays.
        batch: The batch of every step.
        steps: Number of steps that a call takes before it waits, as a loop would that reads the
            loss now and then. On a GPU a step is handed over while the one before it runs.

    Returns:
        A function that takes the next steps and returns the last loss, the first columns of the
        row, and the compiled program.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.opt_state)
    state, batch = [program.trainable, zeros], jax.device_put(batch)
    start = time.perf_counter()
    compiled = (
        jax.jit(program.step).lower(program.trainable, program.frozen, zeros, batch).compile()
    )
    seconds = time.perf_counter() - start

    def call() -> Any:
        for _ in range(steps):
            state[0], state[1], loss = compiled(state[0], program.frozen, state[1], batch)
        return jax.block_until_ready((*state, loss))[-1]

    row = {"trainable_parameters": program.trainable_parameters, "compile_seconds": seconds}
    return call, row | compiled_figures(compiled), compiled


def compiled_call(case: Case, model: nnx.Module) -> tuple[Callable[[], Any], Row, Any]:
    """Compiles a forward pass. Returns the like of `compiled_step`."""
    graphdef, state = nnx.split(model)
    batch = jax.device_put(case.batch)

    def apply(state: Any, batch: Any) -> Any:
        return case.outputs(nnx.merge(graphdef, state, copy=True), batch)

    compiled = jax.jit(apply).lower(state, batch).compile()

    def call() -> Any:
        return jax.block_until_ready(compiled(state, batch))

    return call, compiled_figures(compiled), compiled


def perturbed(model: nnx.Module) -> nnx.Module:
    """Returns the model with random changes to its adapter, in place of training."""
    state = nnx.state(model, dora.DoRAParam)
    key = jax.random.key(7)

    def moved(x: jax.Array) -> jax.Array:
        return x + 0.01 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape, x.dtype)

    nnx.update(model, jax.tree.map(moved, state))
    return model


def measure_device_memory(rows: Mapping[str, Row], calls: Mapping[str, Callable[[], Any]]) -> None:
    """Replaces the peak of the compiled program by the peak that the device's allocator counts.

    The counter never falls, so the programs run in the order of their expected memory. A program
    that does not raise the counter keeps its expected figure. Arrays of other variants are not
    counted.
    """
    device = jax.local_devices()[0]
    if "peak_bytes_in_use" not in (device.memory_stats() or {}):
        return
    for name in sorted(rows, key=lambda name: rows[name]["peak_bytes"]):
        before = device.memory_stats()
        calls[name]()
        peak = device.memory_stats()["peak_bytes_in_use"]
        if peak > before["peak_bytes_in_use"]:
            rows[name]["peak_bytes"] = peak - before["bytes_in_use"] + rows[name]["argument_bytes"]
            rows[name]["peak_source"] = "device allocator"


def time_columns(times: Times) -> Row:
    """Returns the columns of a row that are times."""
    return {"seconds": times.median, "seconds_quartiles": times.quartiles}


def _ratio(times: Times, other: Times) -> Row:
    ratio = times.over(other)
    return {"median": ratio.median, "quartiles": ratio.quartiles}
