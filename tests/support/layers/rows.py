"""A layer type in one front end, as a row of a table: how Flax makes it, what it computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from dora_jax.decomposition import KernelAxes
from tests.support.layers import definitions as by_definition


def plain_call(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One layer type in one front end.

    Attributes:
      name: of the layer type.
      front_end: "linen" or "nnx".
      make: `(dtype=..., param_dtype=..., ...) -> layer`.
      x: shape of the input.
      params: shapes by dotted name.
      kernels: the axes of each kernel to be adapted, by dotted name.
      layer: what it computes, in NumPy.
      call: `(layer, x) -> y` in Flax.
      vocab: if not 0, the input is of integers below it.
      rank: of the adapters.
      traced: whether `apply_dora` has to trace a call.
      refused: what the `LayoutError` says, if the layer cannot be adapted.
    """

    name: str
    front_end: str
    make: Callable[..., Any]
    x: tuple[int, ...]
    params: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, KernelAxes] = dataclasses.field(default_factory=dict)
    layer: by_definition.Layer | None = None
    call: Callable[[Any, jax.Array], jax.Array] = plain_call
    vocab: int = 0
    rank: int = 2
    traced: bool = False
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.front_end})"


def both(name: str, *, linen: Callable[..., Any], nnx: Callable[..., Any], **common: Any):
    """Returns the rows of a layer that is the same in both front ends."""
    return [Row(name, "linen", linen, **common), Row(name, "nnx", nnx, **common)]


def axes(inputs: str, outputs: str, stack: str = "") -> KernelAxes:
    """Returns kernel axes from digits: `axes("01", "2")`."""
    groups = (tuple(map(int, group)) for group in (stack, inputs, outputs))
    return KernelAxes(*groups)


def unroll(cell: Any, x: jax.Array) -> jax.Array:
    """Runs a recurrent cell, which starts from zeros, over `x (time, batch, in)`."""
    features = getattr(cell, "features", None) or cell.hidden_features
    zeros = jnp.zeros((x.shape[1], features), x.dtype)
    carry, outputs = (zeros, zeros) if "LSTM" in type(cell).__name__ else zeros, []
    for x_t in x:
        carry, y = cell(carry, x_t)
        outputs.append(y)
    return jnp.stack(outputs)


def einsum(equation: str, x, kernel, kernel_axes: KernelAxes, bias=None, name: str = ""):
    """Returns the rows of an Einsum layer; `bias` is broadcast against the output."""
    own = None if bias is None else tuple(n for n in bias if n > 1)
    shapes = {"kernel": kernel} | ({} if bias is None else {"bias": own})
    return both(
        name or f"Einsum {equation}",
        linen=functools.partial(linen.Einsum, kernel, equation, use_bias=bias is not None),
        nnx=functools.partial(nnx.Einsum, equation, kernel, own),
        x=x,
        params=shapes,
        kernels={"kernel": kernel_axes},
        layer=by_definition.contraction(equation, bias),
    )


def conv(x, kernel, name: str = "", **fields: Any):
    """Returns the rows of a convolution, of space axes of one stride and one dilation."""
    last = len(kernel) - 1
    definition = by_definition.convolution(
        strides=fields.get("strides", 1),
        padding=_explicit(fields.get("padding", "SAME"), last - 1),
        dilation=fields.get("kernel_dilation", 1),
        input_dilation=fields.get("input_dilation", 1),
        groups=fields.get("feature_group_count", 1),
    )
    return both(
        name or f"Conv {kernel} of {x}, {_text(fields)}",
        linen=functools.partial(linen.Conv, kernel[-1], kernel[:-2], **fields),
        nnx=functools.partial(nnx.Conv, x[-1], kernel[-1], kernel[:-2], **fields),
        x=x,
        params=_with_bias(kernel, kernel[-1], fields),
        kernels={"kernel": KernelAxes((), tuple(range(last)), (last,))},
        layer=definition,
    )


def conv_transpose(x, kernel, name: str = "", **fields: Any):
    """Returns the rows of a transposed convolution, of space axes of one stride and dilation."""
    space, last = len(kernel) - 2, len(kernel) - 1
    transposed = fields.get("transpose_kernel", False)
    inputs, outputs = (last, last - 1) if transposed else (last - 1, last)
    definition = by_definition.transposed_convolution(
        strides=fields.get("strides", 1),
        padding=fields.get("padding", "SAME"),
        dilation=fields.get("kernel_dilation", 1),
        transpose_kernel=transposed,
    )
    per_axis = {k: (v,) * space for k, v in fields.items() if k in ("strides", "kernel_dilation")}
    own = {**fields, **per_axis}
    return both(
        name or f"ConvTranspose {kernel} of {x}, {_text(fields)}",
        linen=functools.partial(linen.ConvTranspose, kernel[outputs], kernel[:space], **own),
        nnx=functools.partial(
            nnx.ConvTranspose, kernel[inputs], kernel[outputs], kernel[:space], **own
        ),
        x=x,
        params=_with_bias(kernel, kernel[outputs], fields),
        kernels={"kernel": KernelAxes((), (*range(space), inputs), (outputs,))},
        layer=definition,
    )


def _explicit(padding: Any, space: int) -> Any:
    """Returns padding as Flax reads it: one number, or numbers or pairs for each space axis."""
    if isinstance(padding, str):
        return padding
    each = (padding,) * space if isinstance(padding, int) else padding
    return [(p, p) if isinstance(p, int) else p for p in each]


def _with_bias(kernel, features: int, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    bias = {"bias": (features,)} if fields.get("use_bias", True) else {}
    return {"kernel": kernel, **bias}


def _text(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in fields.items())


def recurrent(
    name: str, front_end: str, make: Callable[..., Any], dense: dict[str, Any], adapted, layer
):
    """Returns the row of a cell; `dense` has `(in, out)` of each layer, or `(in, out, True)`."""
    params: dict[str, tuple[int, ...]] = {}
    for key, (inputs, outputs, *bias) in dense.items():
        params[f"{key}.kernel"] = (inputs, outputs)
        if bias:
            params[f"{key}.bias"] = (outputs,)
    # Flax's default starts orthogonal, for which newer releases of JAX accept no bfloat16.
    make = functools.partial(make, recurrent_kernel_init=jax.nn.initializers.lecun_normal())
    return Row(
        name,
        front_end,
        make,
        x=(2, 3, 4),
        params=params,
        kernels={f"{key}.kernel": axes("0", "1") for key in adapted},
        layer=layer,
        call=unroll,
    )
