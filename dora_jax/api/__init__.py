"""The functions for either front end, Linen and NNX, as one signature for each."""

from dora_jax.api.adapted import (
    apply_dora,
    apply_mixed,
    check_base,
    disabled_adapters,
    merge,
    precompute_scales,
    shardings,
)
from dora_jax.api.quantized import Distance, from_qwix, quantize, start_from_error

__all__ = [
    "Distance",
    "apply_dora",
    "apply_mixed",
    "check_base",
    "disabled_adapters",
    "from_qwix",
    "merge",
    "precompute_scales",
    "quantize",
    "shardings",
    "start_from_error",
]
