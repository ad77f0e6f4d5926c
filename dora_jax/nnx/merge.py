"""NNX adapters merged into the kernels."""

from __future__ import annotations

from typing import Any

from flax import nnx

from dora_jax.adapters.trees import check_finite
from dora_jax.decomposition.merge_quantized import DEQUANTIZED
from dora_jax.layers.merging import LayerMerge, Losses
from dora_jax.nnx.layers import adapter_of, base_of, detach, kernel_and_axes
from dora_jax.nnx.model import adapted_layers, check_base, get_adapters, named_modules
from dora_jax.nnx.variables import M, copy_model, restore_parameters


def merge(model: M, into: Any = DEQUANTIZED) -> M:
    """Returns a copy of an adapted model with plain layers whose kernels are the merged ones.

    The adapted model stays as it is: keep it, or the base, to have the adapter apart again.

    Args:
      model: the adapted model.
      into: of quantised kernels: "dequantized" merges into the dequantised kernels, which is what
        was trained; "requantized" quantises the result again; a model, the one that was quantised,
        has its kernels merged.

    Raises:
      AdapterError: nothing is adapted, a base kernel changed since `apply_dora`, adapters are not
        finite, or merged kernels are above the largest number of their dtype; names them.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away, or the result is not
        the model that was trained, as `into` asks; says how much.

    Example:
      >>> from flax import nnx
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> type(merge(adapted)).__name__
      'Linear'
    """
    check_base(model)
    check_finite(get_adapters(model))
    model = copy_model(model)
    losses = Losses(into)
    originals = dict(named_modules(into)) if isinstance(into, nnx.Module) else {}
    for path, layer in adapted_layers(model).items():
        kernel, axes = kernel_and_axes(layer)
        original, name = originals.get(path), layer.adapted.layout.kernel
        merged = losses.merged(
            LayerMerge(path, layer.adapted.settings, axes),
            kernel.get_value(),
            adapter_of(layer),
            base_of(layer),
            None if original is None else getattr(original, name).get_value(),
        )
        kernel.set_value(merged)
        detach(layer)
    restore_parameters(model)
    losses.report()
    return model
