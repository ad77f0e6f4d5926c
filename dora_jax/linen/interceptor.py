"""How Linen's layers are adapted as they are called, by a method interceptor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.adapted import AdaptedLayer, adapted_attend, adapted_output
from dora_jax.layers.layout import Call, bind_call
from dora_jax.layers.registry import find_layout

# The name under which a layer's adapter stands among its parameters while the model runs.
ADAPTER_KEY = "dora"


def intercept(
    layers: Mapping[Path, AdaptedLayer],
    dropout: bool,
    next_call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Runs an adapted layer in place of its own `__call__`; leaves every other call alone."""
    module, method = context.module, context.method_name
    layout = find_layout(type(module))
    if layout is None or method not in layout.methods:
        return next_call(*args, **kwargs)
    own = module.variables.get("params", {})
    if ADAPTER_KEY not in own:
        return next_call(*args, **kwargs)
    layer, beside = layers[module.path], meta.unbox(own[ADAPTER_KEY])
    params = {name: value for name, value in own.items() if name != ADAPTER_KEY}
    kernel = meta.unbox(params[layer.layout.kernel])
    prefix = "base_"
    base = {k.removeprefix(prefix): v for k, v in beside.items() if k.startswith(prefix)}
    if method == "attend":
        plain = functools.partial(call_plain, module, params, method=method)
        (query,) = bind_call(getattr(type(module), method), (module, *args), kwargs).values()
        return adapted_attend(
            layer.settings, layer.layout, module, plain, query, kernel, beside, base
        )
    bias = layer.layout.bias
    return adapted_output(
        layer.settings,
        layer.layout,
        module,
        bind_call(type(module).__call__, (module, *args), kwargs),
        layer.call_axes,
        call_plain(module, _zero_bias(params, bias), *args, **kwargs),
        kernel,
        meta.unbox(params[bias]) if bias in params else None,
        beside,
        base,
        functools.partial(_dropout, module, layer.settings.dropout) if dropout else lambda x: x,
        functools.partial(_run, module, layer.layout.kernel),
        module.path,
    )


def _zero_bias(params: Tree, name: str) -> Tree:
    """Returns a layer's parameters with a bias of zero.

    Zero, not none: a bias takes part in the promotion of dtypes. XLA removes the addition.
    """
    if name not in params:
        return params
    return {**params, name: jax.tree.map(jnp.zeros_like, params[name])}


def call_plain(
    module: nn.Module, params: Tree, *args: Any, method: str = "__call__", **kwargs: Any
) -> Any:
    """Calls a layer's own method, with these parameters."""
    plain = module.clone(parent=None, name=None)
    return plain.apply({"params": params}, *args, method=method, **kwargs)


def _run(module: Any, kernel_name: str, call: Call, kernel: jax.Array, features: int) -> jax.Array:
    """Runs a layer's own method with another kernel, of `features` out features, and no bias."""
    other = module.clone(parent=None, name=None, features=features, use_bias=False)
    return other.apply({"params": {kernel_name: kernel}}, **call)


def _dropout(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    if not (module.has_rng("dropout") or module.has_rng("params")):  # make_rng takes either
        raise AdapterError(
            f"{layer_name(module.path)}: adapter dropout needs the stream 'dropout', which a "
            "lifted transform around this layer does not pass on; add it to split_rngs"
        )
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
