"""A policy for rematerialisation: which outputs of adapted layers to save for the backward pass.

The gradient of a magnitude needs the output of its layer; the gradients of LoRA do not. Where a
rematerialised block ends in a projection, such as LLaMA's `down_proj`, LoRA's backward pass never
computes that product again. DoRA's does, unless the output is saved by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dora_jax.errors import Path

_PREFIX = "dora_scaled"


def scaled_name(layer: Path) -> str:
    """Returns the name, for `jax.ad_checkpoint.checkpoint_name`, of a layer's scaled output."""
    return f"{_PREFIX}:{'.'.join(layer)}"


def save_scaled(*layers: str) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint` that saves the scaled outputs of adapted layers.

    Name the last projection of each rematerialised block: only DoRA needs its output in the
    backward pass. The outputs of the other layers are computed again in any case, so that saving
    them gains nothing. The saved array is the output before the bias, in its shape and dtype.

    Args:
      layers: dotted paths or ends of them, as in `DoRAConfig.target_modules`, without the numbers
        in an NNX model's paths. No layer named means all adapted layers.

    Example:
      >>> import dora_jax as dora
      >>> from flax import linen as nn
      >>> class Block(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x + nn.Dense(8, name="down_proj")(nn.relu(nn.Dense(16)(x)))
      >>> block = nn.remat(Block, policy=dora.save_scaled("down_proj"))()
    """
    ends = [f".{layer}" for layer in layers] or [""]

    def policy(primitive: Any, *_: Any, **params: Any) -> bool:
        if primitive.name != "name":  # the primitive of `jax.ad_checkpoint.checkpoint_name`
            return False
        kind, _, layer = params["name"].partition(":")
        return kind == _PREFIX and any(f".{layer}".endswith(end) for end in ends)

    return policy
