"""Adapted Linen models with scales computed once, switched off, or mixed in a batch."""

from __future__ import annotations

from typing import Any

import jax

from dora_jax.adapters.origin import check_origin
from dora_jax.adapters.placement import own_array
from dora_jax.adapters.serving import check_index, disable, select_adapters
from dora_jax.adapters.trees import Tree, flatten, get_in, set_in, unboxed
from dora_jax.decomposition.scale import stored_scale
from dora_jax.linen.model import (
    DoRAModel,
    check_adapters,
    check_base_is_no_constant,
    check_byte_order,
    check_collections,
    origins,
)


def precompute_scales(model: DoRAModel, params: Tree, adapters: Tree) -> dict[str, Any]:
    """Returns an adapter tree that holds each layer's scale, computed here, once.

        {"up": {"lora_a": A, "lora_b": B, "magnitude": m}}  ->
        {"up": {"lora_a": A, "lora_b": B, "scale": m / n}}

    `model.apply` takes it as it takes `adapters`. The scale depends on parameters alone. Inside a
    loss, precompute before a loop over microbatches: the norm is then evaluated, and
    differentiated, once for all of them. For inference, the scale stays fixed: a call costs what
    LoRA's does.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> precompute_scales(model, params, adapters)["scale"]
      Array([1., 1., 1.], dtype=float32)
    """
    check_base_is_no_constant(model)
    check_adapters(model, adapters)
    check_byte_order(params)
    adapters = unboxed(adapters)
    precomputed: Any = adapters
    for path, layer in model.layers.items():
        settings = layer.adapted.settings
        if not settings.decompose:
            continue
        adapter = dict(get_in(adapters, path))
        kernel, base = layer.kernel(params), model.base[path]
        scale = stored_scale(settings, kernel, adapter, base, layer.product(kernel, base))
        adapter.pop("magnitude", None)
        precomputed = set_in(precomputed, path, {**adapter, "scale": scale})
    return jax.tree.map(own_array, precomputed)


def disabled_adapters(model: DoRAModel, adapters: Tree) -> dict[str, Any]:
    """Returns the adapter tree with which the model computes what its base computes.

    It has the structure of `adapters`, so that switching between them compiles nothing anew.
    Modules trained in full stay as they are.
    """
    return disable(adapters, model.base)


def apply_mixed(model: DoRAModel, variables: Tree, index: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Applies a model to a batch in which every example has an adapter of its own.

    The outputs are those of one call for each adapter. Give adapters with precomputed scales, so
    that norms are not computed for each example.

    Args:
      model: the adapted model.
      variables: its collections; the leaves of `dora` are stacked `(adapters, ...)`, as from
        `dora_jax.adapters.stack_adapters`.
      index: which of the adapters each example uses, int `(batch,)`.
      *inputs: arrays with a leading batch axis.
      **kwargs: further arguments, the same for every example.

    Raises:
      AdapterError: the adapters do not fit, or an example has no index.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> both = dora.adapters.stack_adapters([adapters, dora.disabled_adapters(model, adapters)])
      >>> apply_mixed(model, {"params": params, "dora": both}, jnp.array([0, 1, 1, 0, 1]), x).shape
      (5, 3)
    """
    check_collections(variables)
    check_index(index, inputs)
    check_origin(flatten(variables["dora"]), origins(model))
    others = {name: value for name, value in variables.items() if name != "dora"}

    def one(adapters: Tree, *example: Any) -> Any:
        examples = (x[None] for x in example)
        output = model.apply({**others, "dora": adapters}, *examples, **kwargs)
        return jax.tree.map(lambda y: y[0], output)

    return jax.vmap(one)(select_adapters(variables["dora"], index), *inputs)
