"""What the library promises to cost, as data, and where a run's results hold the figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    """An upper bound on one figure.

    Attributes:
        name: As in the report.
        definition: What is divided by what, or measured.
        bound: The figure must not be above it.
        path: Keys into the results; `"*"` stands for any key, and the largest figure counts.
    """

    name: str
    definition: str
    bound: float
    path: tuple[str, ...]

    def measured(self, results: Mapping[str, Any]) -> float | None:
        """Returns the figure; None if the run did not measure it.

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


def _step(backend: str, case: str, variant: str, *ratio: str) -> tuple[str, ...]:
    return ("train", backend, case, "rows", variant, *ratio, "median")


def _compiled(table: str, variant: str, *figure: str) -> tuple[str, ...]:
    return ("ahead_of_time", "*", table, "rows", variant, "over_lora", *figure)


_MEDIAN = "median over rounds of the ratio of two steps of the same round"
_BLOCK = "one LLaMA-7B block and head, 2048 tokens a device, r 32, compiled for TPU: DoRA over LoRA"
_INFERENCE = ("inference", "cpu", "*", "rows")

TARGETS = (
    Target(
        "CPU, MLP of 512 tokens: DoRA over LoRA",
        f"training step, exact gradient; {_MEDIAN}",
        1.06,
        _step("cpu", "mlp-512", "dora", "over_lora"),
    ),
    Target(
        "CPU, MLP of 2048 tokens: DoRA over LoRA",
        f"training step, exact gradient; {_MEDIAN}",
        1.03,
        _step("cpu", "mlp-2048", "dora", "over_lora"),
    ),
    Target(
        "CPU, MiniLM: DoRA over LoRA",
        f"training step, exact gradient; {_MEDIAN}",
        1.05,
        _step("cpu", "minilm", "dora", "over_lora"),
    ),
    Target(
        "CPU: LoRA over LoRA written by hand",
        f"training step, the worst case; {_MEDIAN}",
        1.02,
        _step("cpu", "*", "lora", "over_by_hand"),
    ),
    Target(
        "CPU, MLP of 512 tokens: DoRA over PEFT's DoRA",
        f"training step on the same device in the same run; {_MEDIAN}",
        0.75,
        _step("cpu", "mlp-512", "dora", "over_peer", "peft-dora"),
    ),
    Target(
        "CPU, MiniLM: DoRA over PEFT's DoRA",
        f"training step on the same device in the same run; {_MEDIAN}",
        0.75,
        _step("cpu", "minilm", "dora", "over_peer", "peft-dora"),
    ),
    Target(
        "GPU, LLaMA-7B blocks: DoRA over LoRA",
        f"training step, exact gradient; {_MEDIAN}",
        1.03,
        _step("gpu", "llama-7b", "dora", "over_lora"),
    ),
    Target(
        "GPU, LLaMA-7B blocks: DoRA over PEFT's DoRA",
        f"training step on the same device in the same run; {_MEDIAN}",
        0.70,
        _step("gpu", "llama-7b", "dora", "over_peer", "peft-dora"),
    ),
    Target(
        "CPU, inference: frozen scale over LoRA",
        f"forward pass of DoRA after `dora.precompute_scales`, the worst case; {_MEDIAN}",
        1.01,
        (*_INFERENCE, "dora-frozen-scale", "over_lora", "median"),
    ),
    Target(
        "inference: operations of merged over base",
        "floating point operations of the compiled forward pass, the worst case",
        1.00,
        ("inference", "*", "*", "rows", "merged", "flops_over_base"),
    ),
    Target(
        "TPU, no rematerialisation: FLOPs",
        _BLOCK,
        1.003,
        _compiled("no_remat", "dora", "flops"),
    ),
    Target(
        "TPU, no rematerialisation: bytes accessed",
        f"{_BLOCK}; without VMEM prefetch, which counts bytes several times",
        1.05,
        _compiled("no_remat_traffic", "dora", "bytes_accessed"),
    ),
    Target(
        "TPU, no rematerialisation: bytes accessed, with VMEM prefetch",
        f"{_BLOCK}; as XLA compiles by default, each prefetched slice counted as its whole array",
        1.05,
        _compiled("no_remat", "dora", "bytes_accessed"),
    ),
    Target(
        "TPU, full rematerialisation with `save_scaled`: FLOPs",
        _BLOCK,
        1.005,
        _compiled("remat", "dora-policy", "flops"),
    ),
    Target(
        "TPU, full rematerialisation with `save_scaled`: temporary memory",
        "blocks in a scan, per device: DoRA over LoRA",
        1.10,
        _compiled("scan", "dora-policy", "temporary_bytes"),
    ),
    Target(
        "TPU, microbatches with `dora.precompute_scales`: FLOPs",
        "one LLaMA-7B block and head, 8 microbatches: DoRA over LoRA",
        1.001,
        _compiled("microbatches", "dora-hoisted", "flops"),
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
