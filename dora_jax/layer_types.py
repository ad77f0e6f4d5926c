"""The layouts of Flax's own layer classes, and of any layer that computes an einsum."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen, nnx
from jax import lax

from dora_jax.config import LayoutError
from dora_jax.decomposition import KernelAxes
from dora_jax.layouts import LAYOUTS, REFUSED, Call, Layout, OutputAxes, Refusal, Run
from dora_jax.projections import down_projection, up_projection

if TYPE_CHECKING:
    from jax import Array
    from jax.typing import DTypeLike


def _refuse_stateful_product(layer: Any) -> None:
    for name in ("dot_general_cls", "conv_general_dilated_cls"):
        if getattr(layer, name, None) is not None:
            raise LayoutError(
                f"the {name} of {type(layer).__name__} may keep a state for its one kernel, which "
                "the low-rank products cannot share: exclude_modules, or give it a function"
            )


def _has_own_product(layer: Any) -> bool:
    return getattr(layer, "dot_general", None) not in (None, lax.dot_general)


def _dense_axes(layer: Any, call: Call) -> KernelAxes:
    _refuse_stateful_product(layer)
    return KernelAxes((), (0,), (1,))


def _dense_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    a, b = a.astype(dtype), b.astype(dtype)
    if _has_own_product(layer):  # which may do more than multiply
        xa = run(call, a, a.shape[-1])
    else:
        xa = down_projection(call["inputs"].astype(dtype), a, precision=layer.precision)
    return up_projection(scaling * xa, b, precision=layer.precision)


def _general_axes(layer: Any, call: Call) -> KernelAxes:
    """The kernel of DenseGeneral and LinearGeneral is laid out as (batch, in, out)."""
    _refuse_stateful_product(layer)
    batch = len(_tuple(getattr(layer, "batch_dims", getattr(layer, "batch_axis", ()))))
    inputs = len(_tuple(layer.axis))
    outputs = len(_tuple(getattr(layer, "features", None) or layer.out_features))
    order = tuple(range(batch + inputs + outputs))
    return KernelAxes(order[:batch], order[batch : batch + inputs], order[batch + inputs :])


def _general_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    x = call["inputs"].astype(dtype)
    axes = _general_axes(layer, call)
    contracted = tuple(sorted(axis % x.ndim for axis in _tuple(layer.axis)))  # as Flax does
    product = layer.dot_general or lax.dot_general
    xa = product(
        x,
        a.astype(dtype),
        ((contracted, axes.inputs), (axes.stack, axes.stack)),
        precision=layer.precision,
    )
    return up_projection(
        scaling * xa, b.astype(dtype), stack=len(axes.stack), precision=layer.precision
    )


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


def _conv_axes(layer: Any, call: Call) -> KernelAxes:
    if getattr(layer, "mask", None) is not None:
        raise LayoutError(
            f"{type(layer).__name__} has a mask on its kernel, through which a low-rank product "
            "does not factor: exclude_modules"
        )
    _refuse_stateful_product(layer)
    spatial = 1 if isinstance(layer.kernel_size, int) else len(layer.kernel_size)
    inputs, outputs = (spatial, spatial + 1)
    if getattr(layer, "transpose_kernel", False):
        inputs, outputs = outputs, inputs
    return KernelAxes((), (*range(spatial), inputs), (outputs,))


def _conv_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    """Convolves with A as a kernel of r features (of every group), then mixes them with B."""
    groups = getattr(layer, "feature_group_count", 1)
    kernel = jnp.concatenate([a] * groups, axis=-1).astype(dtype)
    if getattr(layer, "transpose_kernel", False):
        kernel = jnp.swapaxes(kernel, -1, -2)
    rank, outputs = b.shape
    xa = run(call, kernel, groups * rank)
    if groups == 1:
        return up_projection(scaling * xa, b.astype(dtype), precision=layer.precision)
    xa = (scaling * xa).reshape(*xa.shape[:-1], groups, rank)
    b = b.astype(dtype).reshape(rank, groups, outputs // groups)
    y = jnp.einsum("...gr,rgo->...go", xa, b, precision=layer.precision)
    return y.reshape(*y.shape[:-2], outputs)


def _embed_low_rank(
    layer: Any, call: Call, a: Array, b: Array, scaling: float, dtype: DTypeLike, run: Run
) -> Array:
    ids = call["inputs"]
    if a.shape[0] == 1:  # as Flax does: a table of one row is broadcast, whatever the ids
        ids = jnp.zeros_like(ids)
    return up_projection(scaling * jnp.take(a.astype(dtype), ids, axis=0), b.astype(dtype))


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (Sequence, Mapping)) else (value,)


def _flax_equation(layer: Any, call: Call) -> str | None:
    return call.get("einsum_str") or layer.einsum_str


DENSE = Layout(_dense_axes, _dense_low_rank)
GENERAL = Layout(_general_axes, _general_low_rank)
EINSUM = einsum_layout(_flax_equation)
CONV = Layout(_conv_axes, _conv_low_rank, all_linear=False)
EMBED = Layout(
    _dense_axes,
    _embed_low_rank,
    kernel="embedding",
    dropout=False,
    attend=True,
    all_linear=False,
)
LAYOUTS.update(
    {
        linen.Dense: DENSE,
        nnx.Linear: DENSE,
        linen.DenseGeneral: GENERAL,
        nnx.LinearGeneral: GENERAL,
        linen.Einsum: EINSUM,
        nnx.Einsum: EINSUM,
        linen.Conv: CONV,
        nnx.Conv: CONV,
        linen.ConvTranspose: CONV,
        nnx.ConvTranspose: CONV,
        linen.Embed: EMBED,
        nnx.Embed: EMBED,
    }
)
_ADAPTED = Refusal(
    "it has a low-rank adapter already: merge it into a plain nnx.Linear first", True
)
REFUSED.update(
    {
        nnx.LoRA: _ADAPTED,
        nnx.LoRALinear: _ADAPTED,
        linen.ConvLocal: Refusal(
            "its kernel is another one at each position: exclude_modules", False
        ),
        linen.recurrent.DenseParams: Refusal(
            "OptimizedLSTMCell joins the kernels of its gates before it multiplies: use LSTMCell, "
            "which has the same parameters, or exclude_modules",
            True,
        ),
    }
)
