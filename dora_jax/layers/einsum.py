"""The layout of a layer that computes an einsum."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError
from dora_jax.layers.layout import Call, Layout, OutputAxes, Run

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import DTypeLike


def einsum_layout(
    equation: Callable[[Any, Call], str | None],
    *,
    kernel: str = "kernel",
    bias: str = "bias",
    inputs: str = "inputs",
) -> Layout:
    """Returns the layout of a layer that computes `jnp.einsum(equation, inputs, kernel)`.

    A kernel axis is *in* if the output does not have it, *stack* if inputs and output have it,
    *out* if the output alone has it.

    Args:
      equation: `(layer, call) -> str`, from the layer's attributes or from the arguments of the
        call, by name.
      kernel: the name of the kernel among the layer's parameters.
      bias: the name of what the layer adds to the product, if it adds anything.
      inputs: the name of the argument that is multiplied with the kernel.
    """

    def terms(layer: Any, call: Call) -> tuple[str, str, str]:
        try:
            known = equation(layer, call)
        except KeyError:  # an argument of a call that is yet to come
            known = None
        return _einsum_terms(known, type(layer).__name__)

    def axes(layer: Any, call: Call) -> KernelAxes:
        x, w, y = terms(layer, call)
        stack = tuple(i for i, c in enumerate(w) if c in y and c in x)
        contracted = tuple(i for i, c in enumerate(w) if c not in y)
        outputs = tuple(i for i, c in enumerate(w) if c in y and c not in x)
        return KernelAxes(stack, contracted, outputs)

    def low_rank(
        layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
    ) -> Array:
        x, w, y = terms(layer, call)
        stack, contracted, outputs = ("".join(w[i] for i in group) for group in axes(layer, call))
        r = next(c for c in string.ascii_letters if c not in x + w + y)
        kept = "".join(c for c in x if c in y or c == ".") + r
        precision = getattr(layer, "precision", None)
        product = getattr(layer, "einsum_op", jnp.einsum)
        xa = product(
            f"{x},{stack}{contracted}{r}->{kept}",
            call[inputs].astype(dtype),
            a.astype(dtype),
            precision=precision,
        )
        return jnp.einsum(
            f"{kept},{stack}{r}{outputs}->{y}", scaling * xa, b.astype(dtype), precision=precision
        )

    def output_axes(layer: Any, call: Call, axes: KernelAxes) -> OutputAxes:
        _, w, y = terms(layer, call)
        return [
            ... if c == "." else (w.index(c) if c in w else None) for c in y.replace("...", ".")
        ]

    return Layout(axes, low_rank, output_axes, kernel=kernel, bias=bias, inputs=inputs)


def _einsum_terms(equation: str | None, name: str) -> tuple[str, str, str]:
    """Splits an equation into the terms of inputs, kernel and output."""
    if equation is None:
        raise LayoutError(
            f"{name}: its equation is given with each call, so it is not known from the layer "
            "alone: pass inputs=(...) to apply_dora, so that a call can be traced"
        )
    operands, arrow, y = equation.replace(" ", "").partition("->")
    x, comma, w = operands.partition(",")
    if not (arrow and comma) or "." in w or len(set(w)) != len(w):
        raise LayoutError(
            f"{name}: the equation {equation!r} must be explicit ('inputs,kernel->output') and "
            "name each axis of the kernel once, without '...'"
        )
    return x, w, y


def _flax_equation(layer: Any, call: Call) -> str | None:
    return call.get("einsum_str") or layer.einsum_str


EINSUM = einsum_layout(_flax_equation)
