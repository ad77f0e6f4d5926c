"""How Linen's layers are adapted as they are called, by a method interceptor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.adapted import AdaptedLayer, AttendCall, adapted_attend, adapted_output
from dora_jax.layers.layout import Arguments, LayerCall, bind_call
from dora_jax.layers.registry import find_layout
from dora_jax.linen.quantized import frozen_kernel

# The name under which the adapter of a layer, and what is kept of its kernel, stand among the
# layer's parameters while the model runs.
ADAPTER_KEY = "dora"


def intercept(
    layers: Mapping[Path, AdaptedLayer],
    dropout: bool,
    next_call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Runs an adapted layer in place of its own method; leaves every other call alone.

    Args:
      layers: the adapted layers, by module path.
      dropout: whether adapter dropout is active.
      next_call: the intercepted method, bound to its module.
      args: of the call.
      kwargs: of the call.
      context: which module and method are called.
    """
    module, method = context.module, context.method_name
    layout = find_layout(type(module))
    if layout is None or method not in layout.methods:
        return next_call(*args, **kwargs)
    own = module.variables.get("params", {})
    if ADAPTER_KEY not in own:
        return next_call(*args, **kwargs)
    adapted, kept = layers[module.path], meta.unbox(own[ADAPTER_KEY])
    params = {name: value for name, value in own.items() if name != ADAPTER_KEY}
    if method == "attend":
        attend = _attend_call(adapted, module, params, args, kwargs)
        return adapted_attend(adapted, attend, kept["adapter"], kept["base"])
    call = _layer_call(adapted, module, params, args, kwargs)
    if dropout and adapted.settings.rank and layout.dropout:
        drop = functools.partial(_dropout, adapted.settings.dropout)
        key = _dropout_key(module)
        call = dataclasses.replace(call, dropout=jax.tree_util.Partial(drop, key))
    return adapted_output(adapted, call, kept["adapter"], kept["base"])


def call_plain(
    module: nn.Module, params: Tree, *args: Any, method: str = "__call__", **kwargs: Any
) -> Any:
    """Calls a layer's own method, with these parameters."""
    plain = module.clone(parent=None, name=None)
    return plain.apply({"params": params}, *args, method=method, **kwargs)


def _layer_call(
    adapted: AdaptedLayer,
    module: nn.Module,
    params: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> LayerCall:
    """Returns the record of a call without dropout, with the plain layer's output."""
    layout, bias = adapted.layout, adapted.layout.bias
    return LayerCall(
        layer=module,
        arguments=bind_call(type(module).__call__, (module, *args), kwargs),
        plain_output=call_plain(module, _with_zero_bias(params, bias), *args, **kwargs),
        kernel=frozen_kernel(params[layout.kernel]),
        bias=meta.unbox(params[bias]) if bias in params else None,
        dropout=lambda x: x,
        run=functools.partial(_run, module, layout.kernel),
    )


def _attend_call(
    adapted: AdaptedLayer,
    module: Any,
    params: Tree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AttendCall:
    """Returns the record of a call of `attend`."""
    (query,) = bind_call(type(module).attend, (module, *args), kwargs).values()
    plain = functools.partial(call_plain, module, params, method="attend")
    return AttendCall(module, query, frozen_kernel(params[adapted.layout.kernel]), plain)


def _with_zero_bias(params: Tree, name: str) -> Tree:
    """Returns a layer's parameters with a bias of zero.

    Zero, not none: a bias takes part in the promotion of dtypes. XLA removes the addition.
    """
    if name not in params:
        return params
    return {**params, name: jax.tree.map(jnp.zeros_like, params[name])}


def _run(
    module: Any, kernel_name: str, arguments: Arguments, kernel: jax.Array, features: int
) -> jax.Array:
    """Runs a layer's own method with another kernel, of `features` out features, and no bias."""
    dtype = {} if getattr(module, "dtype", None) is None else {"dtype": kernel.dtype}
    other = module.clone(parent=None, name=None, features=features, use_bias=False, **dtype)
    return other.apply({"params": {kernel_name: kernel}}, **arguments)


def _dropout_key(module: nn.Module) -> jax.Array:
    if not (module.has_rng("dropout") or module.has_rng("params")):  # make_rng takes either
        raise AdapterError(
            f"{layer_name(module.path)}: adapter dropout needs the stream 'dropout', which a "
            "lifted transform around this layer does not pass on; add it to split_rngs"
        )
    return module.make_rng("dropout")


def _dropout(rate: float, key: jax.Array, x: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
