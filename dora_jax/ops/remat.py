"""What to save for the backward pass under rematerialisation.

The gradient of a magnitude needs the output of its layer. Plain LoRA has no such need: where a
block ends in a projection, as LLaMA's do in `down_proj`, its backward pass never computes that
product again. DoRA's does, unless the output is saved by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dora_jax.errors import Path

_SCALED = "dora_scaled"


def scaled_name(layer: Path) -> str:
    """Returns the name, for `jax.ad_checkpoint.checkpoint_name`, of a layer's scaled output."""
    return f"{_SCALED}:{'.'.join(layer)}"


def save_scaled(*layers: str) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint` that saves the scaled outputs of adapted layers.

    Name the layers whose output nothing else in the backward pass needs: the last projection of
    each rematerialised block. What is saved is the output before the bias, in its shape and dtype.
    For the other layers nothing is gained, since their outputs are computed again in any case.

    Args:
      layers: dotted paths or their ends (numbers in an NNX model's paths left out), as in
        `DoRAConfig.target_modules`; all adapted layers if there are none.

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
        # Of `checkpoint_name`, the only primitive of this name.
        if primitive.name != "name":
            return False
        kind, _, layer = params["name"].partition(":")
        return kind == _SCALED and any(f".{layer}".endswith(end) for end in ends)

    return policy
