"""NNX layers that carry an adapter: subclasses of the layers they adapt."""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import AdapterError, layer_name
from dora_jax.layers.adapted import AdaptedLayer, AttendCall, adapted_attend, adapted_output
from dora_jax.layers.layout import (
    Arguments,
    LayerCall,
    bind_call,
    is_kernel,
    quantised_since,
    stored_axes,
)
from dora_jax.layers.registry import find_layout
from dora_jax.nnx.metadata import layer_metadata, variable_like
from dora_jax.nnx.variables import BaseParam, DoRAParam

if TYPE_CHECKING:
    from flax.nnx.module import ModuleMeta
else:
    ModuleMeta = type(nnx.Module)

# The attributes of a layer that hold the arrays of its `FrozenBase`: `base_norm` and so on.
BASE_PREFIX = "base_"


class AdaptedClass(ModuleMeta):
    """The type of adapted classes, so that pickle makes one anew from the plain class."""


class DoRALayer(nnx.Module, metaclass=AdaptedClass):
    """Mixed into a layer's class by `apply_dora`.

    Attributes:
      lora_a, lora_b, magnitude: `DoRAParam` of shapes `(*stack, *in, r)`, `(*stack, r, *out)`,
        `(*stack, *out)`; absent where the settings have none.
      base_norm, base_first_row, base_mask, base_init_a, base_init_b: `BaseParam`, the arrays of
        `dora_jax.decomposition.FrozenBase`; absent where that has none.
      lora_dropout: `nnx.Dropout` on the input of the low-rank branch.
      adapted: the layer's settings, layout and axes. Its path has no numbers, so that equal blocks
        have equal graphs.
    """

    adapted: AdaptedLayer
    lora_dropout: nnx.Dropout

    def __call__(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns the adapted output, of the shape and dtype of the plain layer's."""
        call = _layer_call(self, args, kwargs)
        return adapted_output(self.adapted, call, adapter_of(self), base_of(self))


class DoRALinear(DoRALayer, nnx.Linear):
    """`nnx.Linear` with an adapter."""


def _attend(self: Any, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Attends over the adapted table, as the layer's own `attend` over the plain one."""
    layer_class: Any = plain_class(type(self))
    kernel = kernel_of(self).get_value()
    call = AttendCall(
        self, query, kernel, lambda query: layer_class.attend(self, query, *args, **kwargs)
    )
    return adapted_attend(self.adapted, call, adapter_of(self), base_of(self))


class DoRAEmbed(DoRALayer, nnx.Embed):
    """`nnx.Embed` with an adapter, which `attend` sees too."""

    attend = _attend


@functools.cache
def dora_class(layer_class: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the subclass of a layer class whose instances carry an adapter."""
    if layer_class is nnx.Linear:
        return DoRALinear
    if layer_class is nnx.Embed:
        return DoRAEmbed
    layout = find_layout(layer_class)
    methods = {"attend": _attend} if layout is not None and layout.attend else {}
    metaclass: Any = type(layer_class)
    made = types.new_class(
        f"DoRA{layer_class.__name__}",
        (DoRALayer, layer_class),
        {"metaclass": _metaclass(metaclass)},
        lambda namespace: namespace.update(methods),
    )
    return cast("type[nnx.Module]", made)


@functools.cache
def _metaclass(of_layer: type) -> type:
    """Returns the type of the adapted classes of layer classes that have a metaclass."""
    if issubclass(AdaptedClass, of_layer):
        return AdaptedClass
    both = type("AdaptedClass", (AdaptedClass, of_layer), {})
    copyreg.pickle(both, _reduce_class)
    return both


def _reduce_class(adapted_class: Any) -> str | tuple[Any, ...]:
    """Tells pickle how an adapted class is found: by its name, or by the class that was adapted."""
    if adapted_class.__module__ == __name__ and adapted_class.__name__ in globals():
        return str(adapted_class.__name__)
    return dora_class, (plain_class(adapted_class),)


copyreg.pickle(AdaptedClass, _reduce_class)


def plain_class(adapted_class: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the class that was adapted."""
    return adapted_class.__mro__[2]


def set_class(layer: nnx.Module, layer_class: type[nnx.Module]) -> None:
    """Changes a layer's class in place, so that whatever holds the layer need not be found."""
    object.__setattr__(layer, "__class__", layer_class)


def adapter_of(layer: Any) -> dict[str, jax.Array]:
    """Returns the arrays of a layer's adapter, by name."""
    return {name: getattr(layer, name)[...] for name in layer.adapted.settings.parameter_names}


def kernel_of(layer: Any) -> nnx.Variable:
    """Returns the variable of a layer's frozen kernel.

    Raises:
      AdapterError: it is none any more, because another library quantised the model.
    """
    kernel = getattr(layer, layer.adapted.layout.kernel)
    if isinstance(kernel, nnx.Variable) and is_kernel(kernel.get_value()):
        return kernel
    value = kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel
    raise AdapterError(f"{layer_name(layer.adapted.path)}: {quantised_since(value)}")


def kernel_and_axes(layer: Any) -> tuple[nnx.Variable, KernelAxes]:
    """Returns the frozen kernel of an adapted layer, and the axes of what is stored."""
    kernel = kernel_of(layer)
    return kernel, stored_axes(layer.adapted.axes, kernel.ndim, type(layer).__name__)


def base_of(layer: Any) -> FrozenBase:
    """Returns what an adapted layer keeps of its frozen kernel."""
    named = ((name.removeprefix(BASE_PREFIX), name) for name in _base_attributes(layer))
    return FrozenBase(**{field: _value(getattr(layer, name)) for field, name in named})


def attach(layer: Any, adapted: AdaptedLayer, adapter: dict[str, Any], base: FrozenBase) -> None:
    """Makes a layer carry an adapter, in place; its dropout gets its keys apart."""
    set_class(layer, dora_class(layer.__class__))
    layer.adapted = adapted
    layer.lora_dropout = nnx.Dropout(adapted.settings.dropout)
    kernel, axes = kernel_and_axes(layer)
    metadata = layer_metadata(kernel, axes)
    for name, value in adapter.items():
        setattr(layer, name, variable_like(DoRAParam, value, kernel, metadata.get(name)))
    for name, value in base.arrays().items():
        own = variable_like(BaseParam, value, kernel, metadata.get(name))
        setattr(layer, BASE_PREFIX + name, own)


def detach(layer: Any) -> None:
    """Makes an adapted layer plain again, in place; its kernel stays as it is."""
    names = layer.adapted.settings.parameter_names
    for name in (*names, *_base_attributes(layer), "lora_dropout", "adapted"):
        delattr(layer, name)
    set_class(layer, plain_class(type(layer)))


def view_of(layer: Any, **attributes: Any) -> Any:
    """Returns a view of a layer with some attributes exchanged; its variables are the layer's."""
    view = object.__new__(type(layer))
    vars(view).update(vars(layer), **attributes)
    return view


def _value(variable: nnx.Variable) -> Any:
    """Returns a variable's array; it may be abstract, and then cannot be indexed."""
    value = variable.get_value()
    return value if isinstance(value, jax.ShapeDtypeStruct) else variable[...]


def _base_attributes(layer: Any) -> list[str]:
    return [name for name in vars(layer) if name.startswith(BASE_PREFIX)]


def _layer_call(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
    """Returns the record of a call, with the plain layer's output."""
    layer_class, layout = plain_class(type(layer)), layer.adapted.layout
    kernel = kernel_of(layer)
    bias = getattr(layer, layout.bias, None)
    return LayerCall(
        layer=layer,
        arguments=bind_call(layer_class.__call__, (layer, *args), kwargs),
        plain_output=layer_class.__call__(_with_zero_bias(layer, layout.bias), *args, **kwargs),
        kernel=kernel.get_value(),
        bias=None if bias is None else bias[...],
        dropout=_dropout(layer),
        run=functools.partial(_run, layer, layer_class),
    )


def _dropout(layer: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns the adapter's dropout; where it acts, its key is drawn here."""
    dropout, adapted = layer.lora_dropout, layer.adapted
    acts = adapted.layout.dropout and adapted.settings.rank and dropout.rate
    if not acts or dropout.deterministic or dropout.rngs is None:
        return cast("Callable[[jax.Array], jax.Array]", dropout)
    return jax.tree_util.Partial(dropout, rngs=dropout.rngs())


def _with_zero_bias(layer: Any, name: str) -> Any:
    """Returns a view of a layer whose bias is zero.

    Zero, not None: a bias takes part in the promotion of dtypes. XLA removes the addition.
    """
    bias = getattr(layer, name, None)
    if bias is None:
        return layer
    return view_of(layer, **{name: nnx.Param(jnp.zeros_like(bias[...]))})


def _run(
    layer: Any,
    layer_class: type[nnx.Module],
    arguments: Arguments,
    kernel: jax.Array,
    features: int,
) -> jax.Array:
    """Runs a layer's own method with another kernel, of `features` out features, and no bias."""
    view = view_of(
        layer,
        **{layer.adapted.layout.kernel: nnx.Param(kernel)},
        kernel_shape=kernel.shape,
        out_features=features,
        use_bias=False,
        bias=None,
        dtype=None if getattr(layer, "dtype", None) is None else kernel.dtype,
    )
    return layer_class.__call__(view, **arguments)
