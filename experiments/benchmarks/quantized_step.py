"""Counts a DoRA step on quantised kernels against one on bfloat16 kernels, compiled for a TPU.

No TPU is needed, but libtpu (`pip install 'dora-jax[tpu-compile]'`). Operations, bytes and
temporaries are XLA's counts of a step of square layers with a GELU between them, with AdamW. Left
out are the exact ways for columns that nearly vanish, and prefetch into VMEM, which counts twice.

Examples:
  python -m experiments.benchmarks.quantized_step
  python -m experiments.benchmarks.quantized_step --bases bf16 nf4 --tokens 2048
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.ahead_of_time import WITHOUT_VMEM_PREFETCH, compile_for, target_mesh
from experiments.benchmarks.cases import Base, Case
from experiments.benchmarks.steps import METHODS, Adapter, make_program
from experiments.trainer.command_line import in_one_line, settings

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float


@dataclasses.dataclass(frozen=True)
class Config:
    """Count a DoRA step on quantised kernels."""

    # A TPU topology of one chip, or cpu. (On several chips products are not joined.)
    target: str = "v5e:1x1"
    # What the kernels lie in: bf16, nf4, int4, int8, fp8. The first is what others are divided by.
    bases: tuple[Base, ...] = ("bf16", "int8", "nf4")
    # Features of each layer.
    width: int = 4096
    # Number of layers.
    depth: int = 3
    # Rows of the batch.
    tokens: int = 512
    # Rank of the adapters.
    rank: int = 16


class Layers(nnx.Module):
    """Square linear layers in bfloat16, each with a GELU after it."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs) -> None:
        dtypes: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.layers = nnx.List(
            [nnx.Linear(width, width, use_bias=False, **dtypes, rngs=rngs) for _ in range(depth)]
        )

    def __call__(self, x: BFloat16[Array, "token feature"]) -> BFloat16[Array, "token feature"]:
        """Applies the layers."""
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        return x


def case(config: Config) -> Case:
    """Returns the layers, and a batch of shapes."""

    def loss(model: Any, batch: Any) -> Float[Array, ""]:
        return jnp.mean(jnp.square(model(batch["x"]).astype(jnp.float32)))

    x: Any = jax.ShapeDtypeStruct((config.tokens, config.width), jnp.bfloat16)
    return Case(
        title=f"{config.depth} x {config.width}, {config.tokens} tokens, r {config.rank}",
        build=lambda: Layers(config.width, config.depth, nnx.Rngs(0)),
        batch={"x": x},
        outputs=lambda model, batch: model(batch["x"]),
        loss=loss,
        adapter=Adapter(r"layers\..*", config.rank, alpha=2.0 * config.rank),
        tokens=config.tokens,
        shape=config,
        dtype="bfloat16",
    )


def measure(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the counts of a step by what its kernels lie in."""
    mesh = target_mesh(config.target)
    found: dict[str, dict[str, Any]] = {}
    options = None if config.target == "cpu" else WITHOUT_VMEM_PREFETCH
    own = case(config)
    for base in config.bases:
        program = make_program(METHODS["dora"], own.abstract(base), own.adapter, own.loss)
        found[base] = compile_for(program, own.batch, mesh, "replicated", options)
    return found


def table(config: Config, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table of counts, and their ratios to the first."""
    first, *_ = found.values()
    yield f"{case(config).title}, compiled for {config.target}"
    yield ""
    yield "| kernels | MB accessed | ratio | MB of temporaries | more | GFLOP | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for base, row in found.items():
        size, temporaries, flops = row["bytes_accessed"], row["temporary_bytes"], row["flops"]
        yield (
            f"| {base} | {size / 1e6:.0f} | {size / first['bytes_accessed']:.3f} "
            f"| {temporaries / 1e6:.1f} | {(temporaries - first['temporary_bytes']) / 1e6:.1f} "
            f"| {flops / 1e9:.1f} | {flops / first['flops']:.3f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line, compiles and prints."""
    config = settings(Config, __doc__, arguments)
    with in_one_line("Nothing is kept."):
        print("\n".join(table(config, measure(config))))


if __name__ == "__main__":
    main()
