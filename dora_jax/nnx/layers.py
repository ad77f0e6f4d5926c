"""NNX layers that carry an adapter: subclasses of the layers they adapt, with their variables."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dora_jax.layers.adapted import adapted_attend, adapted_output
from dora_jax.layers.layout import Call, Layout, bind_call
from dora_jax.layers.registry import find_layout


class DoRALayer(nnx.Module):
    """Mixed into a layer's class by `apply_dora`.

    Attributes:
      lora_a, lora_b, magnitude: `DoRAParam` of shapes `(*stack, *in, r)`, `(*stack, r, *out)`,
        `(*stack, *out)`; absent where the settings have none.
      base_norm, base_row: `BaseParam`, see `dora_jax.decomposition.describe_base`; base_mask,
        base_init_a, base_init_b where there are any, see `effective_factors` there.
      lora_dropout: `nnx.Dropout` on the input of the low-rank branch.
      settings: the layer's settings.
      call_axes: the axes of the kernel that one call sees.
      layer_path: of the layer, without numbers, so that equal blocks have equal graphs.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns the adapted output, of the shape and dtype of the plain layer's."""
        layer_class = plain_class(type(self))
        layout = layout_of(layer_class)
        bias = getattr(self, layout.bias, None)
        return adapted_output(
            self.settings,
            layout,
            self,
            bind_call(layer_class.__call__, (self, *args), kwargs),
            self.call_axes,
            layer_class.__call__(_without_bias(self, layout.bias), *args, **kwargs),
            getattr(self, layout.kernel)[...],
            None if bias is None else bias[...],
            adapter_of(self),
            base_of(self),
            self.lora_dropout,
            functools.partial(_run, self, layer_class),
            self.layer_path,
        )


class DoRALinear(DoRALayer, nnx.Linear):
    """`nnx.Linear` with an adapter."""


def _attend(self: Any, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Attends over the adapted table, as the layer's own `attend` over the plain one."""
    layer_class: Any = plain_class(type(self))
    layout = layout_of(layer_class)
    return adapted_attend(
        self.settings,
        layout,
        self,
        lambda query: layer_class.attend(self, query, *args, **kwargs),
        query,
        getattr(self, layout.kernel)[...],
        adapter_of(self),
        base_of(self),
    )


class DoRAEmbed(DoRALayer, nnx.Embed):
    """`nnx.Embed` with an adapter, which `attend` sees too."""

    attend = _attend


OWN_ATTRIBUTES = ("lora_dropout", "settings", "call_axes", "layer_path")


@functools.cache
def dora_class(layer_class: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the subclass of a layer class whose instances carry an adapter."""
    if layer_class is nnx.Linear:
        return DoRALinear
    if layer_class is nnx.Embed:
        return DoRAEmbed
    methods = {"attend": _attend} if layout_of(layer_class).attend else {}
    return type(f"DoRA{layer_class.__name__}", (DoRALayer, layer_class), methods)


def plain_class(adapted_class: type[nnx.Module]) -> type[nnx.Module]:
    """Returns the class that was adapted."""
    return adapted_class.__mro__[2]


def layout_of(layer_class: type[nnx.Module]) -> Layout:
    """Returns the layout of a class that has one."""
    layout = find_layout(layer_class)
    assert layout is not None, f"{layer_class} lost its layout"
    return layout


def set_class(layer: nnx.Module, layer_class: type[nnx.Module]) -> None:
    """Changes a layer's class in place, so that whatever holds it need not be found."""
    object.__setattr__(layer, "__class__", layer_class)


def view_of(layer: Any, **attributes: Any) -> Any:
    """Returns a view of a layer with some attributes exchanged; its variables are the layer's."""
    view = object.__new__(type(layer))
    vars(view).update(vars(layer), **attributes)
    return view


def _without_bias(layer: Any, name: str) -> Any:
    """Returns a view of a layer whose bias is zero.

    Zero, not None: a bias takes part in the promotion of dtypes. XLA removes the addition.
    """
    bias = getattr(layer, name, None)
    if bias is None:
        return layer
    return view_of(layer, **{name: nnx.Param(jnp.zeros_like(bias[...]))})


def _run(
    layer: Any, layer_class: type[nnx.Module], call: Call, kernel: jax.Array, features: int
) -> jax.Array:
    """Runs a layer's own method with another kernel, of `features` out features, and no bias."""
    name = layout_of(layer_class).kernel
    view = view_of(
        layer,
        **{name: nnx.Param(kernel)},
        kernel_shape=kernel.shape,
        out_features=features,
        use_bias=False,
        bias=None,
    )
    return layer_class.__call__(view, **call)


def adapter_of(layer: Any) -> dict[str, jax.Array]:
    """Returns the arrays of a layer's adapter, by name."""
    return {name: getattr(layer, name)[...] for name in layer.settings.parameter_names}


def base_of(layer: Any) -> dict[str, jax.Array]:
    """Returns what an adapted layer keeps of its kernel, see `decomposition.describe_base`."""
    prefix = "base_"
    return {k.removeprefix(prefix): v[...] for k, v in vars(layer).items() if k.startswith(prefix)}
