"""What the backward pass keeps of each layer of a decoder, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax

import dora_jax as dora

Remat = Literal["none", "full", "save_scaled", "dots", "dots_and_scaled"]

_SCALED = dora.save_scaled("down_proj")
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

REMAT: Mapping[Remat, bool | Callable[..., bool]] = {
    "none": False,
    "full": True,
    "save_scaled": _SCALED,
    "dots": _DOTS,
    "dots_and_scaled": jax.checkpoint_policies.save_from_both_policies(_DOTS, _SCALED),
}
"""Values of the argument `remat` of `Llama`, from most memory to least work.

- `"none"`: all activations are kept.
- `"full"`: the input of each layer is kept, and the layer is computed again.
- `"save_scaled"`: the output of the last projection is kept as well. With it DoRA's backward pass
  computes no product that LoRA's does not (see `dora.save_scaled`).
- `"dots"`: the products with the kernels and the factors are kept, and what is between them is
  computed again.
- `"dots_and_scaled"`: both.
"""
