"""NNX adapters merged into the kernels."""

from __future__ import annotations

from dora_jax.adapters.trees import check_finite
from dora_jax.decomposition.merge import check_rounding, merge_kernel
from dora_jax.nnx.layers import adapter_of, base_of, detach, kernel_and_axes
from dora_jax.nnx.model import adapted_layers, check_base, get_adapters
from dora_jax.nnx.variables import M, copy_model, restore_parameters


def merge(model: M) -> M:
    """Returns a copy of an adapted model with plain layers whose kernels are the merged ones.

    The adapted model stays as it is: keep it, or the base, to have the adapter apart again.

    Raises:
      AdapterError: nothing is adapted, a base kernel changed since `apply_dora`, adapters are not
        finite, or merged kernels are above the largest number of their dtype; names them.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away; says how much.

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
    rounding_losses = {}
    for path, layer in adapted_layers(model).items():
        kernel, axes = kernel_and_axes(layer)
        merged, rounding_losses[path] = merge_kernel(
            layer.adapted.settings, kernel[...], adapter_of(layer), base_of(layer), axes
        )
        kernel.set_value(merged)
        detach(layer)
    restore_parameters(model)
    check_rounding(rounding_losses)
    return model
