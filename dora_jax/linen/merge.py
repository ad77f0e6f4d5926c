"""Linen adapters merged into the parameters."""

from __future__ import annotations

from typing import Any

import jax

from dora_jax.adapters.placement import own_array
from dora_jax.adapters.trees import Tree, check_finite, get_in, overlay, set_in, unboxed
from dora_jax.decomposition.merge_quantized import DEQUANTIZED
from dora_jax.errors import AdapterError
from dora_jax.layers.merging import LayerMerge, Losses
from dora_jax.linen.model import DoRAModel, check_adapters, check_base, saved_modules
from dora_jax.linen.quantized import boxed


def merge(
    model: DoRAModel, params: Tree, adapters: Tree, into: str | Tree = DEQUANTIZED
) -> dict[str, Any]:
    """Returns plain parameters with the merged kernels, of the structure of `params`.

    Args:
      model: the adapted model.
      params: the base's `params` collection.
      adapters: the adapter tree.
      into: of quantised kernels: "dequantized" merges into the dequantised kernels, which is what
        was trained; "requantized" quantises the result again; parameters, those that were
        quantised, have their kernels merged.

    Raises:
      AdapterError: an adapter array is missing or does not fit, or a kernel is not the one that its
        adapter was made for; names the layer. Adapters are not finite, or the merged kernels are
        above the largest number of their dtype; names them.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away, or the result is not
        the model that was trained, as `into` asks; says how much.

    Example:
      >>> import dora_jax as dora, jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> bool((merge(model, params, adapters)["kernel"] == params["kernel"]).all())
      True
    """
    if not adapters:
        raise AdapterError("the adapter tree is empty: nothing to merge")
    check_adapters(model, adapters)
    check_base(model, params)
    check_finite(adapters)
    adapters = unboxed(adapters)
    merged: Tree = params
    losses = Losses(into)
    for path, layer in model.layers.items():
        settings, name = layer.adapted.settings, layer.adapted.layout.kernel
        own, kernel = get_in(params, path), layer.kernel(params)
        original = None
        if not isinstance(into, str):
            original = unboxed(get_in(into, (*path, name), "into="))
        new = losses.merged(
            LayerMerge(path, settings, layer.axes),
            kernel,
            get_in(adapters, path),
            model.base[path],
            original,
        )
        merged = set_in(merged, path, {**own, name: boxed(own[name], new)})
    losses.report()
    saved = jax.tree.map(own_array, saved_modules(model.layers, adapters))
    return overlay(merged, saved)
