"""Several ways to compute DoRA's scale. The library uses one of them.

`python -m experiments.benchmarks.designs` measures them on a chain of square layers. Every design
computes the same values and the exact gradient. They differ in how they compute the norm. With
`n` the norm of `V = W0 + s A B` and `d = (m - n) / n`:

    y = h + d h,  h = x W0 + s (x A) B,  n^2 = ||W0||^2 + 2 s <A^T W0, B> + s^2 diag(B^T A^T A B)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Times, time_in_turn
from experiments.trainer.command_line import in_one_line, settings

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Layer = dict[str, Array]
    Scale = Float[Array, " out"]

SCALING = 2.0


def square_change(layer: Layer) -> Scale:
    """Returns `||V||^2 - ||W0||^2` from the factors."""
    cross = layer["a"].T @ layer["kernel"]
    return _change_from_cross(layer, cross)


def _change_from_cross(layer: Layer, cross: Float[Array, "r out"]) -> Scale:
    a, b = layer["a"], layer["b"]
    return SCALING * jnp.sum((2 * cross + SCALING * (a.T @ a) @ b) * b, axis=0)


def _scale(layer: Layer, square: Scale) -> Scale:
    n = jnp.sqrt(square)
    return (layer["m"] - n) / n


def _low_rank(layer: Layer, x: Array) -> Array:
    return SCALING * (x @ layer["a"]) @ layer["b"]


def lora(layer: Layer, x: Array) -> Array:
    """Plain LoRA, the base of the ratios."""
    return x @ layer["kernel"] + _low_rank(layer, x)


def in_layer(layer: Layer, x: Array) -> Array:
    """Computes the norm in the layer from the factors and a stored `||W0||^2`.

    JAX differentiates it.
    """
    h = lora(layer, x)
    return h + _scale(layer, layer["square"] + square_change(layer)) * h


def norm_anew(layer: Layer, x: Array) -> Array:
    """Like `in_layer`, but computes `||W0||^2` in each step."""
    return in_layer({**layer, "square": jnp.sum(jnp.square(layer["kernel"]), axis=0)}, x)


def joined(layer: Layer, x: Array) -> Array:
    """Computes `A^T W0` as r more rows of the layer's product, so the kernel is read once."""
    rows = jnp.concatenate([x, layer["a"].T]) @ layer["kernel"]
    h = rows[: len(x)] + _low_rank(layer, x)
    square = layer["square"] + _change_from_cross(layer, rows[len(x) :])
    return h + _scale(layer, square) * h


@jax.custom_vjp  # the library has a `custom_jvp`, which also supports forward mode
def _square_change_by_hand(layer: Layer) -> Scale:
    return square_change(layer)


def _forward(layer: Layer) -> tuple[Scale, tuple[Layer, Array, Array]]:
    cross, gram = layer["a"].T @ layer["kernel"], layer["a"].T @ layer["a"]
    change = SCALING * jnp.sum((2 * cross + SCALING * gram @ layer["b"]) * layer["b"], axis=0)
    return change, (layer, cross, gram)


def _backward(kept: tuple[Layer, Array, Array], g: Scale) -> tuple[Layer]:
    layer, cross, gram = kept
    b = layer["b"]
    gb = 2 * SCALING * g * b
    by_a = layer["kernel"] @ gb.T + SCALING * layer["a"] @ (b @ gb.T)
    by_b = 2 * SCALING * g * (cross + SCALING * gram @ b)
    return ({**jax.tree.map(jnp.zeros_like, layer), "a": by_a, "b": by_b},)


_square_change_by_hand.defvjp(_forward, _backward)


def by_hand(layer: Layer, x: Array) -> Array:
    """Like `in_layer`, with the gradient of the norm written by hand: the library's design.

    Each product is computed once.
    """
    h = lora(layer, x)
    return h + _scale(layer, layer["square"] + _square_change_by_hand(layer)) * h


def hoisted(layer: Layer, x: Array) -> Array:
    """Takes a scale that was computed outside of the model, see `gradient`."""
    h = lora(layer, x)
    return h + layer["scale"] * h


def materialized(layer: Layer, x: Array) -> Array:
    """Evaluates the definition: computes `V`, of the kernel's size, in each step."""
    v = layer["kernel"] + SCALING * layer["a"] @ layer["b"]
    return x @ (layer["m"] / jnp.linalg.norm(v, axis=0) * v)


DESIGNS: dict[str, Callable[[Layer, Array], Array]] = {
    "lora": lora,
    "in layer": in_layer,
    "norm anew": norm_anew,
    "joined": joined,
    "by hand": by_hand,
    "hoisted": hoisted,
    "materialized": materialized,
}
TRAINED = ("a", "b", "m")


def make_layers(width: int, rank: int, depth: int) -> list[Layer]:
    """Returns random layers whose B is not zero and whose magnitude is not the norm."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, spread: float) -> np.ndarray:
        return spread * rng.standard_normal(shape, np.float32)

    layers = []
    for _ in range(depth):
        kernel = normal(width, width, spread=width**-0.5)
        norm = np.linalg.norm(kernel, axis=0)
        arrays = {
            "kernel": kernel,
            "a": normal(width, rank, spread=width**-0.5),
            "b": normal(rank, width, spread=0.1),
            "m": norm * (1 + normal(width, spread=0.1)),
            "square": np.square(norm),
        }
        layers.append(jax.tree.map(jnp.asarray, arrays))
    return layers


def gradient(design: str) -> Callable[[list[Layer], list[Layer], Array], list[Layer]]:
    """Returns a function `(trained, frozen, x) -> gradient` for the trained arrays."""

    def loss(trained: list[Layer], frozen: list[Layer], x: Array) -> Float[Array, ""]:
        for t, f in zip(trained, frozen, strict=True):
            x = jax.nn.gelu(DESIGNS[design]({**t, **f}, x))
        return jnp.mean(jnp.square(x))

    def with_scale(trained: list[Layer], frozen: list[Layer]) -> list[Layer]:
        layers = [{**t, **f} for t, f in zip(trained, frozen, strict=True)]
        scales = [_scale(layer, layer["square"] + square_change(layer)) for layer in layers]
        return [{**t, "scale": d} for t, d in zip(trained, scales, strict=True)]

    def hoisted_gradient(trained: list[Layer], frozen: list[Layer], x: Array) -> list[Layer]:
        scaled, pull_back = jax.vjp(functools.partial(with_scale, frozen=frozen), trained)
        return pull_back(jax.grad(loss)(scaled, frozen, x))[0]

    return hoisted_gradient if design == "hoisted" else jax.grad(loss)


def split(layers: list[Layer], names: tuple[str, ...] = TRAINED) -> tuple[list[Layer], list[Layer]]:
    """Returns the trained arrays and the other arrays of each layer."""
    trained = [{k: v for k, v in layer.items() if k in names} for layer in layers]
    frozen = [{k: v for k, v in layer.items() if k not in names} for layer in layers]
    return trained, frozen


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The cost of a design.

    Attributes:
        gigaflops: Operations of one gradient, as compiled for this machine.
        megabytes: Bytes read and written by one gradient, as compiled for this machine.
        times: Seconds of each gradient.
        error: Largest difference of the gradient from that of `in_layer`, relative to the largest
            entry. None for LoRA, whose gradient is another one.
    """

    gigaflops: float
    megabytes: float
    times: Times
    error: float | None


def measure(width: int, rank: int, depth: int, tokens: int, rounds: int) -> dict[str, Measurement]:
    """Times the gradients of all designs in turn."""
    trained, frozen = split(make_layers(width, rank, depth))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, width), np.float32))
    compiled = {d: jax.jit(gradient(d)).lower(trained, frozen, x).compile() for d in DESIGNS}
    grads = {design: run(trained, frozen, x) for design, run in compiled.items()}
    times = time_in_turn(
        {
            d: functools.partial(lambda run: jax.block_until_ready(run(trained, frozen, x)), run)
            for d, run in compiled.items()
        },
        rounds=rounds,
    )
    costs: dict[str, Any] = {d: run.cost_analysis() for d, run in compiled.items()}
    return {
        d: Measurement(
            costs[d]["flops"] / 1e9,
            costs[d]["bytes accessed"] / 1e6,
            times[d],
            None if d == "lora" else _difference(grads[d], grads["in layer"]),
        )
        for d in DESIGNS
    }


def _difference(one: Any, other: Any) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the designs of DoRA's scale on this machine, and prints a Markdown table."""

    width: int = 1024
    """Features of each layer."""
    rank: int = 16
    """Rank r."""
    depth: int = 4
    """Number of layers."""
    tokens: tuple[int, ...] = (512, 2048)
    """Rows of the inputs. Each number gives one table."""
    rounds: int = 30
    """Number of times that each gradient is timed."""


def main(options: Options) -> None:
    """Prints one table for each number of tokens."""
    for tokens in options.tokens:
        found = measure(options.width, options.rank, options.depth, tokens, options.rounds)
        base = found["lora"]
        print(f"\n{options.depth} x {options.width}, {tokens} tokens, rank {options.rank}\n")
        print("| design | time / LoRA | quartiles | ms | FLOPs / LoRA | bytes / LoRA | error |")
        print("|---|---|---|---|---|---|---|")
        for design, m in found.items():
            ratio = m.times.over(base.times)
            low, high = ratio.quartiles
            error = "" if m.error is None else f"{m.error:.0e}"
            print(
                f"| {design} | {ratio.median:.3f} | {low:.3f} to {high:.3f} "
                f"| {m.times.median * 1e3:.1f} | {m.gigaflops / base.gigaflops:.3f} "
                f"| {m.megabytes / base.megabytes:.2f} | {error} |"
            )


if __name__ == "__main__":
    with in_one_line("Nothing is kept."):
        main(settings(Options, Options.__doc__))
