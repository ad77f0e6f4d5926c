"""Which layout each layer class has, and which classes cannot be adapted."""

from __future__ import annotations

import copyreg
import inspect
from typing import Any

from flax import linen, nnx

from dora_jax.errors import LayoutError, Path, layer_name
from dora_jax.layers.conv import ConvLayout
from dora_jax.layers.dense import DenseLayout, EmbedLayout, GeneralLayout
from dora_jax.layers.einsum import EinsumLayout
from dora_jax.layers.layout import Layout, Unsupported

LAYOUTS: dict[type, Layout] = {}
UNSUPPORTED: dict[type, Unsupported] = {}


def register_layout(layer_class: type, layout: Layout) -> None:
    """Makes a layer class known, so that `apply_dora` adapts its instances.

    Raises:
      TypeError: what is given is no class, or no `Layout`.
      LayoutError: the layout names an argument that the class's `__call__` does not take, or more
        than one kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from dora_jax.layers import einsum_layout
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
      ...     einsum_layout(lambda layer, arguments: arguments["equation"], kernel="w", inputs="x"),
      ... )
      >>> find_layout(Projection).kernel
      'w'
    """
    if not (isinstance(layer_class, type) and isinstance(layout, Layout)):
        raise TypeError(f"expected a class and a Layout, got {layer_class!r} and {type(layout)}")
    if not isinstance(layout.kernel, str):
        raise LayoutError(
            f"the layout of {layer_class.__name__} names {layout.kernel!r}: a layout describes a "
            "layer of one kernel. Make each a layer of its own"
        )
    arguments = list(inspect.signature(layer_class.__call__).parameters)[1:]
    if layout.inputs not in arguments:
        raise LayoutError(
            f"{layer_class.__name__}.__call__ takes {arguments}, not {layout.inputs!r}: name the "
            "argument that the kernel is multiplied with"
        )
    LAYOUTS[layer_class] = layout
    copyreg.pickle(type(layout), _reduce_layout)


def _reduce_layout(layout: Layout) -> Any:
    """Tells pickle to find a layout by its class: it may hold functions without names."""
    for layer_class, known in LAYOUTS.items():
        if known == layout:
            return _registered, (layer_class,)
    return object.__reduce_ex__(layout, 2)


def _registered(layer_class: type) -> Layout:
    """Returns the layout that a class was registered with."""
    if layer_class not in LAYOUTS:
        name = layer_class.__name__
        raise LayoutError(f"{name} is not registered here: register_layout({name}, ...) first")
    return LAYOUTS[layer_class]


def find_layout(layer_class: type) -> Layout | None:
    """Returns the layout of a class, or None where it is not known.

    A subclass of a known class has its layout, unless it has a `__call__` (or `attend`) of its own:
    then what it does with the kernel is not known, and it must be registered itself.
    """
    for known in layer_class.__mro__:
        if known in LAYOUTS:
            return None if _own_method(layer_class, known) else LAYOUTS[known]
    return None


def check_not_intercepted(path: Path, layer_class: type) -> None:
    """Raises `LayoutError` for a module whose products qwix replaces while it runs.

    It would replace those of the adapter too, or take them for the layer's.
    """
    if hasattr(layer_class, "_unquantized_type"):
        raise LayoutError(
            f"{layer_name(path)} runs under qwix (quantize_model or apply_lora_to_model), which is "
            "not adapted yet: adapt the model as it was before"
        )


def _own_method(layer_class: type, known: type) -> str | None:
    """Returns the name of a method with which a subclass uses the kernel in a way of its own."""
    methods = LAYOUTS[known].methods
    return next((m for m in methods if getattr(layer_class, m) is not getattr(known, m)), None)


def unsupported_reason(layer_class: type) -> Unsupported | None:
    """Returns why a class that holds a kernel cannot be adapted; None if nothing is known of it."""
    for known in layer_class.__mro__:
        if known in UNSUPPORTED:
            return UNSUPPORTED[known]
        if known in LAYOUTS:
            if (method := _own_method(layer_class, known)) is None:
                return None
            name = layer_class.__name__
            reason = (
                f"{name} has a method {method} of its own, so what it does with the kernel of "
                f"{known.__name__} is not known: register_layout({name}, ...), or exclude_modules"
            )
            return Unsupported(reason, LAYOUTS[known].all_linear)
    return None


LAYOUTS.update(
    {
        linen.Dense: DenseLayout(),
        nnx.Linear: DenseLayout(),
        linen.DenseGeneral: GeneralLayout(),
        nnx.LinearGeneral: GeneralLayout(),
        linen.Einsum: EinsumLayout(),
        nnx.Einsum: EinsumLayout(),
        linen.Conv: ConvLayout(),
        nnx.Conv: ConvLayout(),
        linen.ConvTranspose: ConvLayout(),
        nnx.ConvTranspose: ConvLayout(),
        linen.Embed: EmbedLayout(),
        nnx.Embed: EmbedLayout(),
    }
)

_ADAPTED = Unsupported(
    "it has a low-rank adapter already: merge it into a plain nnx.Linear first", True
)

UNSUPPORTED.update(
    {
        nnx.LoRA: _ADAPTED,
        nnx.LoRALinear: _ADAPTED,
        linen.ConvLocal: Unsupported(
            "its kernel is another one at each position: exclude_modules", False
        ),
        linen.recurrent.DenseParams: Unsupported(
            "OptimizedLSTMCell joins the kernels of its gates before it multiplies: use LSTMCell, "
            "which has the same parameters, or exclude_modules",
            True,
        ),
    }
)
