"""What to save for the backward pass under rematerialisation.

The gradient of a magnitude needs its layer's output before the scale, `h = x (W0 + s A B)`. Plain
LoRA has no such need: where a block ends in a projection, as LLaMA's do in `down_proj`, its
backward pass never computes that product again. DoRA's does, unless `h` is saved by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jax.ad_checkpoint import checkpoint_name

from dora_jax.config import Path

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PRE_SCALE = "dora_pre_scale"


def name_pre_scale(h: Float[Array, "*batch out"], layer: Path) -> Float[Array, "*batch out"]:
    """Names a layer's output before the scale `dora_pre_scale:<dotted path>`."""
    return checkpoint_name(h, f"{PRE_SCALE}:{'.'.join(layer)}")


def save_pre_scale(*layers: str) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint` that saves adapted layers' outputs before their scale.

    Name the layers whose output nothing else in the backward pass needs: the last projection of
    each rematerialised block. The saved array has the shape and dtype of the layer's output. For
    the other layers nothing is gained, since their outputs are computed again in any case.

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
      >>> block = nn.remat(Block, policy=dora.save_pre_scale("down_proj"))()
    """
    ends = [f".{layer}" for layer in layers] or [""]

    def policy(primitive: Any, *_: Any, **params: Any) -> bool:
        # Of `checkpoint_name`, the only primitive of this name.
        if primitive.name != "name":
            return False
        kind, _, layer = params["name"].partition(":")
        return kind == PRE_SCALE and any(f".{layer}".endswith(end) for end in ends)

    return policy
