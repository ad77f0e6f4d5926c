"""For each Flax layer class: which kernel axes are contracted, and its low-rank branch.

One `Layout` serves a Linen layer and its NNX namesake, since both have the same attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from dora_jax.config import AdapterSpec, LayoutError
from dora_jax.decomposition import Adapter, KernelAxes, apply_scale, scale_minus_one

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer class uses its kernel.

    Attributes:
      axes: from the layer to the axes of the kernel that one call of it sees (stack axes that a
        scan or vmap adds in front are found from the stored kernel).
      low_rank: `(layer, inputs, lora_a, lora_b, scaling, dtype) -> scaling * (inputs A) B`, in
        the shape of the layer's output.
      kernel: the name of the kernel among the layer's parameters.
      all_linear: whether `target_modules="all-linear"` covers the layer.
    """

    axes: Callable[[Any], KernelAxes]
    low_rank: Callable[..., Array]
    kernel: str = "kernel"
    all_linear: bool = True


_LAYOUTS: dict[type, Layout] = {}


def register_layout(layer_class: type, layout: Layout) -> None:
    """Makes a layer class known, so that `apply_dora` adapts its instances.

    Example:
      >>> from flax import nnx
      >>> class Projection(nnx.Linear):
      ...     def __call__(self, inputs):
      ...         return super().__call__(inputs)
      >>> find_layout(Projection) is None  # it has a `__call__` of its own
      True
      >>> register_layout(Projection, DENSE)
      >>> find_layout(Projection) is DENSE
      True
    """
    _LAYOUTS[layer_class] = layout


def find_layout(layer_class: type) -> Layout | None:
    """Returns the layout of a class, or None where it is not known.

    A subclass of a known class has its layout, unless it has a `__call__` of its own: then what it
    does with the kernel is not known, and it must be registered itself.
    """
    for known in layer_class.__mro__:
        if known in _LAYOUTS:
            same_call = getattr(layer_class, "__call__") is getattr(known, "__call__")  # noqa: B004
            return _LAYOUTS[known] if same_call else None
    return None


def stored_axes(axes: KernelAxes, stored_ndim: int, path: str) -> KernelAxes:
    """Returns the axes of a stored kernel, whose further leading axes are stack.

    Raises:
      LayoutError: the stored kernel has fewer axes than the layer contracts.

    Example:
      >>> stored_axes(KernelAxes((), (0,), (1,)), 3, "layers.mlp")
      KernelAxes(stack=(0,), inputs=(1,), outputs=(2,))
    """
    extra = stored_ndim - axes.ndim
    if extra < 0:
        raise LayoutError(
            f"{path}: the kernel has {stored_ndim} axes, its layer needs at least {axes.ndim}"
        )
    stack, inputs, outputs = (tuple(i + extra for i in group) for group in axes)
    return KernelAxes(tuple(range(extra)) + stack, inputs, outputs)


def adapted_output(
    spec: AdapterSpec,
    layout: Layout,
    layer: Any,
    inputs: Float[Array, "..."],
    plain_output: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    adapter: Adapter,
    base: Adapter,
    dropout: Callable[[Array], Array],
) -> Float[Array, "..."]:
    """Returns the output of an adapted layer: `h + d h + bias`, `h = x W0 + s dropout(x) A B`.

    The bias is not scaled, hence `plain_output` is the layer's output *without* it: taking it off
    again would not be exact.

    Args:
      layer: the Linen or NNX layer, for its attributes.
      plain_output: `x W0`, from the layer's own method.
      dropout: acts on the input of the low-rank branch.
    """
    h = plain_output
    dtype = compute_dtype(layer, inputs, kernel)
    if spec.rank:
        branch = layout.low_rank(
            layer, dropout(inputs), adapter["lora_a"], adapter["lora_b"], spec.scaling, dtype
        )
        h = h + branch.astype(h.dtype)
    if spec.decompose:
        d = scale_minus_one(
            spec, kernel, adapter, base, layout.axes(layer), dtype=dtype, precision=layer.precision
        )
        h = apply_scale(h, d)
    return h if bias is None else h + bias.astype(h.dtype)


def compute_dtype(layer: Any, inputs: Array, kernel: Array) -> DTypeLike:
    """Returns the dtype in which a layer multiplies: its own `dtype`, or what its arguments promote to."""
    return layer.dtype or jnp.result_type(inputs, kernel)


def _dense_low_rank(
    layer: Any,
    inputs: Float[Array, "*batch in"],
    lora_a: Float[Array, "in r"],
    lora_b: Float[Array, "r out"],
    scaling: float,
    dtype: DTypeLike,
) -> Float[Array, "*batch out"]:
    def matmul(x: Array, w: Array) -> Array:
        return jnp.matmul(x, w.astype(dtype), precision=layer.precision)

    return matmul(scaling * matmul(inputs.astype(dtype), lora_a), lora_b)


DENSE = Layout(axes=lambda layer: KernelAxes((), (0,), (1,)), low_rank=_dense_low_rank)

for _layer_class in (linen.Dense, nnx.Linear):
    register_layout(_layer_class, DENSE)
