"""For each Flax layer class: which kernel axes are stacked, contracted, output; its low rank.

One `Layout` serves a Linen layer and its NNX namesake, since both have the same attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_jax.config import LayoutError
from dora_jax.decomposition import (
    KernelAxes,
)

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


class Refusal(NamedTuple):
    """Why a layer class is not adapted, with the mend; and whether "all-linear" would mean it."""

    reason: str
    all_linear: bool


LAYOUTS: dict[type, Layout] = {}
REFUSED: dict[type, Refusal] = {}


def register_layout(layer_class: type, layout: Layout) -> None:
    """Makes a layer class known, so that `apply_dora` adapts its instances.

    Raises:
      TypeError: what is given is no class, or no `Layout`.
      LayoutError: the layout names an argument that the class's `__call__` does not take.

    Example:
      >>> import jax.numpy as jnp
      >>> from dora_jax import einsum_layout
      >>> from flax import linen as nn
      >>> class Projection(nn.Module):  # a parameter `w` and an equation given with each call
      ...     shape: tuple[int, ...]
      ...
      ...     @nn.compact
      ...     def __call__(self, equation, x):
      ...         w = self.param("w", nn.initializers.normal(), self.shape)
      ...         return jnp.einsum(equation, x, w)
      >>> register_layout(
      ...     Projection,
      ...     einsum_layout(lambda layer, call: call["equation"], kernel="w", inputs="x"),
      ... )
      >>> find_layout(Projection).kernel
      'w'
    """
    if not (isinstance(layer_class, type) and isinstance(layout, Layout)):
        raise TypeError(f"expected a class and a Layout, got {layer_class!r} and {type(layout)}")
    arguments = list(inspect.signature(layer_class.__call__).parameters)[1:]
    if layout.inputs not in arguments:
        raise LayoutError(
            f"{layer_class.__name__}.__call__ takes {arguments}, not {layout.inputs!r}: name the "
            "argument that the kernel is multiplied with"
        )
    LAYOUTS[layer_class] = layout


def find_layout(layer_class: type) -> Layout | None:
    """Returns the layout of a class, or None where it is not known.

    A subclass of a known class has its layout, unless it has a `__call__` (or `attend`) of its own:
    then what it does with the kernel is not known, and it must be registered itself.
    """
    for known in layer_class.__mro__:
        if known in LAYOUTS:
            return None if _own_method(layer_class, known) else LAYOUTS[known]
    return None


def _own_method(layer_class: type, known: type) -> str | None:
    """Returns the name of a method with which a subclass uses the kernel in a way of its own."""
    methods = LAYOUTS[known].methods
    return next((m for m in methods if getattr(layer_class, m) is not getattr(known, m)), None)


def why_refused(layer_class: type) -> Refusal | None:
    """Returns why a class that holds a kernel cannot be adapted; None if nothing is known of it."""
    for known in layer_class.__mro__:
        if known in REFUSED:
            return REFUSED[known]
        if known in LAYOUTS:
            if (method := _own_method(layer_class, known)) is None:
                return None
            name = layer_class.__name__
            reason = (
                f"{name} has a method {method} of its own, so what it does with the kernel of "
                f"{known.__name__} is not known: register_layout({name}, ...), or exclude_modules"
            )
            return Refusal(reason, LAYOUTS[known].all_linear)
    return None


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
