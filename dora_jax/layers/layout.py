"""For each Flax layer class: which kernel axes are stacked, contracted, output; its low rank.

One `Layout` serves a Linen layer and its NNX namesake, since both have the same attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import LayoutError

if TYPE_CHECKING:
    from jaxtyping import Array


# The arguments of a layer's call, by name.
Call = Mapping[str, Any]
# Where the kernel's axes stand in a layer's output: a kernel axis, None for an axis of the inputs,
# `...` for any number of those.
OutputAxes = Sequence["int | EllipsisType | None"]
# `run(call, kernel, features)`: the layer's own method with another kernel and no bias.
Run = Callable[[Call, "Array", int], "Array"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer class uses its kernel.

    Attributes:
      axes: `(layer, call) -> KernelAxes` of the kernel that one call of the layer sees (stack axes
        that a scan or vmap adds in front are found from the stored kernel). `call` is empty where
        there is none yet.
      low_rank: `(layer, call, lora_a, lora_b, scaling, dtype, run) -> scaling * (inputs A) B`, in
        the shape of the layer's output. `call` holds the inputs after dropout.
      output_axes: `(layer, call, axes) -> OutputAxes`: by default the stack axes first, then those
        of the inputs, then the out axes.
      kernel: the name of the kernel among the layer's parameters.
      bias: the name of what the layer adds to its output, if it adds anything: it is not scaled.
      inputs: the name of the argument that the kernel is multiplied with.
      dropout: whether adapter dropout can act on that argument.
      attend: whether the layer has a method `attend(query)` that computes `query kernel^T`.
      all_linear: whether `target_modules="all-linear"` covers the layer.
    """

    axes: Callable[[Any, Call], KernelAxes]
    low_rank: Callable[..., Array]
    output_axes: Callable[[Any, Call, KernelAxes], OutputAxes] = lambda layer, call, axes: (
        *axes.stack,
        ...,
        *axes.outputs,
    )
    kernel: str = "kernel"
    bias: str = "bias"
    inputs: str = "inputs"
    dropout: bool = True
    attend: bool = False
    all_linear: bool = True

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of a layer that use its kernel."""
        return ("__call__", "attend") if self.attend else ("__call__",)


class Unsupported(NamedTuple):
    """Why a layer class is not adapted, with the mend; and whether "all-linear" would mean it."""

    reason: str
    all_linear: bool


def bind_call(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a method's call by name, without its first, the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> list(bind_call(nnx.Linear.__call__, (layer, jnp.ones(3)), {}))
      ['inputs', 'out_sharding']
    """
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


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


def refuse_stateful_product(layer: Any) -> None:
    for name in ("dot_general_cls", "conv_general_dilated_cls"):
        if getattr(layer, name, None) is not None:
            raise LayoutError(
                f"the {name} of {type(layer).__name__} may keep a state for its one kernel, which "
                "the low-rank products cannot share: exclude_modules, or give it a function"
            )


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (Sequence, Mapping)) else (value,)
