"""Upper bounds on the cost of the library, and where the results of a run hold the figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    """An upper bound on one figure.

    Attributes:
        name: The name in the report.
        definition: The definition of the figure, in words.
        bound: The largest value that meets the target.
        path: Keys into the results. `"*"` matches any key, and the largest figure counts.
    """

    name: str
    definition: str
    bound: float
    path: tuple[str, ...]

    def measured(self, results: Mapping[str, Any]) -> float | None:
        """Returns the figure, or None if the run did not measure it.

        Example:
            >>> target = Target("", "", 1.0, ("train", "*", "seconds"))
            >>> target.measured({"train": {"a": {"seconds": 2.0}, "b": {"seconds": 3.0}, "c": {}}})
            3.0
        """
        return max(_find(results, self.path), default=None)


def _find(results: Any, path: tuple[str, ...]) -> Iterator[float]:
    if not path:
        yield float(results)
    elif isinstance(results, Mapping):
        for key in results if path[0] == "*" else [path[0]]:
            if results.get(key) is not None:
                yield from _find(results[key], path[1:])


_MEDIAN = "median over rounds of the ratio of two steps of the same round"


def _step(
    name: str, bound: float, path: str, *ratio: str, work: str = "training step, exact gradient"
) -> Target:
    """A ratio of two training steps. `path` is `backend/case/variant`."""
    backend, case, variant = path.split("/")
    keys = ("train", backend, case, "rows", variant, *ratio, "median")
    return Target(name, f"{work}; {_MEDIAN}", bound, keys)


def _peer_step(name: str, bound: float, path: str) -> Target:
    work = "training step on the same device in the same run"
    return _step(name, bound, path, "over_peer", "peft-dora", work=work)


def _compiled(name: str, bound: float, path: str, definition: str = "") -> Target:
    """A ratio of two programs compiled for a TPU. `path` is `table/variant/figure`."""
    table, variant, figure = path.split("/")
    keys = ("ahead_of_time", "*", table, "rows", variant, "over_lora", figure)
    return Target(name, definition or _BLOCK, bound, keys)


_BLOCK = "one LLaMA-7B block and head, 2048 tokens a device, r 32, compiled for TPU: DoRA over LoRA"
_NO_PREFETCH = f"{_BLOCK}; without VMEM prefetch, which counts bytes several times"
_PREFETCH = (
    f"{_BLOCK}; as XLA compiles by default, each prefetched slice counted as its whole array"
)
_SCAN = "blocks in a scan, per device: DoRA over LoRA"
_MICROBATCHES = "one LLaMA-7B block and head, 8 microbatches: DoRA over LoRA"

TARGETS = (
    _step("CPU, MLP of 512 tokens: DoRA over LoRA", 1.06, "cpu/mlp-512/dora", "over_lora"),
    _step("CPU, MLP of 2048 tokens: DoRA over LoRA", 1.03, "cpu/mlp-2048/dora", "over_lora"),
    _step("CPU, MiniLM: DoRA over LoRA", 1.05, "cpu/minilm/dora", "over_lora"),
    _step(
        "CPU: LoRA over LoRA written by hand",
        1.02,
        "cpu/*/lora",
        "over_by_hand",
        work="training step, the worst case",
    ),
    _peer_step("CPU, MLP of 512 tokens: DoRA over PEFT's DoRA", 0.75, "cpu/mlp-512/dora"),
    _peer_step("CPU, MiniLM: DoRA over PEFT's DoRA", 0.75, "cpu/minilm/dora"),
    _step("GPU, LLaMA-7B blocks: DoRA over LoRA", 1.03, "gpu/llama-7b/dora", "over_lora"),
    _peer_step("GPU, LLaMA-7B blocks: DoRA over PEFT's DoRA", 0.70, "gpu/llama-7b/dora"),
    Target(
        "CPU, inference: frozen scale over LoRA",
        f"forward pass of DoRA after `dora.precompute_scales`, the worst case; {_MEDIAN}",
        1.01,
        ("inference", "cpu", "*", "rows", "dora-frozen-scale", "over_lora", "median"),
    ),
    Target(
        "inference: operations of merged over base",
        "floating point operations of the compiled forward pass, the worst case",
        1.00,
        ("inference", "*", "*", "rows", "merged", "flops_over_base"),
    ),
    _compiled("TPU, no rematerialisation: FLOPs", 1.003, "no_remat/dora/flops"),
    _compiled(
        "TPU, no rematerialisation: bytes accessed",
        1.05,
        "no_remat_traffic/dora/bytes_accessed",
        _NO_PREFETCH,
    ),
    _compiled(
        "TPU, no rematerialisation: bytes accessed, with VMEM prefetch",
        1.05,
        "no_remat/dora/bytes_accessed",
        _PREFETCH,
    ),
    _compiled(
        "TPU, full rematerialisation with `save_scaled`: FLOPs", 1.005, "remat/dora-policy/flops"
    ),
    _compiled(
        "TPU, full rematerialisation with `save_scaled`: temporary memory",
        1.10,
        "scan/dora-policy/temporary_bytes",
        _SCAN,
    ),
    _compiled(
        "TPU, microbatches with `dora.precompute_scales`: FLOPs",
        1.001,
        "microbatches/dora-hoisted/flops",
        _MICROBATCHES,
    ),
    Target(
        "abstract LLaMA-7B: seconds",
        "`dora.apply_dora` on a model of shapes, with and without stacked layers",
        5.0,
        ("abstract", "host", "*", "seconds"),
    ),
    Target(
        "abstract LLaMA-7B: GB",
        "the process's peak resident memory, Python and JAX included",
        1.0,
        ("abstract", "host", "*", "peak_gb"),
    ),
)
"""The bounds, in the order of the report."""
