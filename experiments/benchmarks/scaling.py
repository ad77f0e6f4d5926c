"""DoRA's cost over LoRA against tokens, rank, width and depth, and a model of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.benchmarks.ahead_of_time import no_compilation_cache
from experiments.benchmarks.cases import Case, MLPShape, llama, mlp
from experiments.benchmarks.device_runs import measure_training
from experiments.benchmarks.steps import METHODS, make_program
from experiments.models.llama_config import LlamaConfig

VARIANTS = ("lora", "dora", "dora-detached")


def expected_overhead(tokens: int, rank: int, *, detached: bool = False) -> float:
    """Returns the model of DoRA's operations over LoRA's: `1 + r / N`, detached `1 + r / 2N`.

    For N tokens and a kernel of `in x out`, the frozen product and the gradient through it take
    `2 N in out` operations each. The norm adds `A^T W` with `2 r in out` operations, and the exact
    gradient adds as many. Products without the kernel are neglected, so r must be much smaller than
    in and out.

    Example:
        >>> expected_overhead(512, 16)
        1.03125
    """
    return 1 + rank / tokens / (2 if detached else 1)


def _tokens(x: int) -> Case:
    return mlp(tokens=x)


def _rank(x: int) -> Case:
    return mlp(tokens=512, rank=x)


def _width(x: int) -> Case:
    return mlp(tokens=512, shape=MLPShape(width=x))


def _adapters(x: int) -> Case:
    return mlp(tokens=512, rank=8, shape=MLPShape(width=256, depth=x))


CURVES: dict[str, tuple[str, Callable[[int], Case] | None, tuple[int, ...]]] = {
    "tokens": ("tokens per step", _tokens, (128, 256, 512, 1024, 2048, 4096)),
    "rank": ("rank, 512 tokens", _rank, (4, 8, 16, 32, 64, 128, 256, 512)),
    "width": ("width, 512 tokens", _width, (256, 512, 1024, 2048)),
    "adapters": ("adapted layers", _adapters, (1, 2, 4, 8, 16, 32)),
    "compile": ("layers", None, (1, 2, 4, 8, 16)),
}
"""The curves by name: the axis, the case at a point, and the points.

`compile` measures compile times instead of steps.
"""


def measure(curve: str, rounds: int, points: Sequence[int] = ()) -> dict[str, Any]:
    """Measures a curve.

    Args:
        curve: A name in `CURVES`.
        rounds: Timed steps of each point.
        points: Replace the points of the curve.

    Returns:
        The curve by its name: `axis` and `points`.
    """
    axis, case_at, own = CURVES[curve]
    measured = []
    for x in points or own:
        point = _compile_point(x) if case_at is None else _overhead_point(case_at(x), rounds)
        measured.append({"x": x, **point})
        print(f"  {axis}: {x}", flush=True)
    return {curve: {"axis": axis, "points": measured}}


def _overhead_point(case: Case, rounds: int) -> dict[str, Any]:
    """Returns DoRA over LoRA: measured, counted by the compiler, and expected."""
    rows = measure_training(case, VARIANTS, rounds=rounds)
    return {
        variant: {
            "over_lora": rows[variant]["over_lora"],
            "flops_over_lora": rows[variant]["flops"] / rows["lora"]["flops"],
            "expected": expected_overhead(
                case.tokens, case.adapter.rank, detached=variant == "dora-detached"
            ),
        }
        for variant in VARIANTS[1:]
    }


def _compile_point(depth: int, hidden: int = 128) -> dict[str, float]:
    """Returns seconds to trace and compile a step of LoRA and DoRA, with and without a scan."""
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
    )
    point = {}
    for scan in (False, True):
        case = llama(shape=shape, length=16, rank=4, scan_layers=scan)
        for method in ("lora", "dora"):
            name = f"{method}, {'scan' if scan else 'layers apart'}"
            point[name] = _compile_seconds(case, method)
    return point


def _compile_seconds(case: Case, method: str) -> float:
    program = make_program(METHODS[method], case.abstract(), case.adapter, case.loss)
    start = time.perf_counter()
    with no_compilation_cache():
        jax.jit(program.step).lower(
            program.trainable, program.frozen, program.opt_state, case.batch
        ).compile()
    return time.perf_counter() - start
