"""The layout of a layer that computes an einsum."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError
from dora_jax.layers.layout import Arguments, LayerCall, Layout, LowRank, OutputAxes

if TYPE_CHECKING:
    from jax import Array


def flax_equation(layer: Any, arguments: Arguments) -> str | None:
    """Returns the equation of Flax's `Einsum`: from the call, or else from the layer."""
    return arguments.get("einsum_str") or layer.einsum_str


@dataclasses.dataclass(frozen=True)
class EinsumLayout(Layout):
    """A layer that computes `jnp.einsum(equation, inputs, kernel)`.

    A kernel axis is *in* if the output does not have it, *stack* if inputs and output have it,
    *out* if the output alone has it.

    Attributes:
      equation: `(layer, arguments) -> str`, from the layer's attributes or from the arguments of
        the call, by name.
    """

    equation: Callable[[Any, Arguments], str | None] = flax_equation

    def axes(self, layer: Any, arguments: Arguments) -> KernelAxes:
        """Returns the axes that the equation's letters say."""
        x, w, y = self._terms(layer, arguments)
        stack = tuple(i for i, c in enumerate(w) if c in y and c in x)
        contracted = tuple(i for i, c in enumerate(w) if c not in y)
        outputs = tuple(i for i, c in enumerate(w) if c in y and c not in x)
        return KernelAxes(stack, contracted, outputs)

    def low_rank(self, call: LayerCall, branch: LowRank) -> Array:
        """Returns `s (x A) B`, as two einsums."""
        x, w, y = self._terms(call.layer, call.arguments)
        axes = self.axes(call.layer, call.arguments)
        stack, contracted, outputs = ("".join(w[i] for i in group) for group in axes)
        r = next(c for c in string.ascii_letters if c not in x + w + y)
        kept = "".join(c for c in x if c in y or c == ".") + r
        precision = getattr(call.layer, "precision", None)
        product = getattr(call.layer, "einsum_op", jnp.einsum)
        a, b = branch.factors()
        xa = product(
            f"{x},{stack}{contracted}{r}->{kept}",
            call.arguments[self.inputs].astype(branch.dtype),
            a,
            precision=precision,
        )
        return jnp.einsum(f"{kept},{stack}{r}{outputs}->{y}", xa, b, precision=precision)

    def output_axes(self, layer: Any, arguments: Arguments, axes: KernelAxes) -> OutputAxes:
        """Returns the kernel's axis for each letter of the output."""
        _, w, y = self._terms(layer, arguments)
        return [
            ... if c == "." else (w.index(c) if c in w else None) for c in y.replace("...", ".")
        ]

    def _terms(self, layer: Any, arguments: Arguments) -> tuple[str, str, str]:
        """Returns the terms of inputs, kernel and output."""
        try:
            equation = self.equation(layer, arguments)
        except KeyError:  # an argument of a call that is yet to come
            equation = None
        return _split_equation(equation, type(layer).__name__)


def einsum_layout(
    equation: Callable[[Any, Arguments], str | None],
    *,
    kernel: str = "kernel",
    bias: str = "bias",
    inputs: str = "inputs",
) -> EinsumLayout:
    """Returns the layout of a layer that computes `jnp.einsum(equation, inputs, kernel)`.

    Args:
      equation: `(layer, arguments) -> str`, from the layer's attributes or from the arguments of
        the call, by name.
      kernel: the name of the kernel among the layer's parameters.
      bias: the name of what the layer adds to the product, if it adds anything.
      inputs: the name of the argument that is multiplied with the kernel.

    Example:
      >>> einsum_layout(lambda layer, arguments: "...i,io->...o").axes(None, {})
      KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    """
    return EinsumLayout(kernel=kernel, bias=bias, inputs=inputs, equation=equation)


def _split_equation(equation: str | None, name: str) -> tuple[str, str, str]:
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
