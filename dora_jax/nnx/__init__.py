"""DoRA for Flax NNX: layers that carry their adapter.

An adapted layer is the same object, of a subclass of its class. So the paths and attributes of the
base model, and the base checkpoints made for them, stay valid.
"""

from dora_jax.nnx.adapt import adapt_to_load, apply_dora
from dora_jax.nnx.inference import apply_mixed, disabled_adapters, precompute_scales
from dora_jax.nnx.layers import kernel_and_axes
from dora_jax.nnx.merge import merge
from dora_jax.nnx.model import (
    adapted_layers,
    check_base,
    get_adapters,
    set_adapters,
)
from dora_jax.nnx.quantized import quantize
from dora_jax.nnx.sharding import shardings
from dora_jax.nnx.variables import BaseParam, DoRAParam, SavedParam

__all__ = [
    "BaseParam",
    "DoRAParam",
    "SavedParam",
    "adapt_to_load",
    "adapted_layers",
    "apply_dora",
    "apply_mixed",
    "check_base",
    "disabled_adapters",
    "get_adapters",
    "kernel_and_axes",
    "merge",
    "precompute_scales",
    "quantize",
    "set_adapters",
    "shardings",
]
