"""NNX adapters merged into the kernels."""

from __future__ import annotations

from flax import nnx

from dora_jax.decomposition.merge import merge_kernel, warn_of_rounding
from dora_jax.nnx.layers import adapter_of, base_of, detach
from dora_jax.nnx.model import adapted_layers, check_base, copy_model, kernel_and_axes
from dora_jax.nnx.variables import M, SavedParam, retype_parameters


def merge(model: M) -> M:
    """Returns a copy of an adapted model with plain layers whose kernels are the merged ones.

    The adapted model stays as it is: keep it, or the base, to have the adapter apart again.

    Raises:
      AdapterError: nothing is adapted, or a base kernel changed since `apply_dora`.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away; says how much.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> type(merge(adapted)).__name__
      'Linear'
    """
    check_base(model)
    model = copy_model(model)
    rounding_losses = {}
    for path, layer in adapted_layers(model).items():
        kernel, axes = kernel_and_axes(layer)
        kernel[...], rounding_losses[path] = merge_kernel(
            layer.adapted.settings, kernel[...], adapter_of(layer), base_of(layer), axes
        )
        detach(layer)
    retype_parameters(model, SavedParam, nnx.Param)
    warn_of_rounding(rounding_losses)
    return model
