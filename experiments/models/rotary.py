"""Rotary embeddings: the angle of each position, and the rotation of heads by it.

Source: arXiv 2104.09864. The settings are in `rope.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from experiments.models.llama_config import LlamaConfig

    Angles = Float[Array, "batch_or_1 seq half_features"]


def rotary_frequencies(config: LlamaConfig) -> Float[Array, " half_head"]:
    """Returns the rotation of each pair of a head's features from token to token, in radians.

    It is `theta^(-2i / head_dim)` (arXiv 2104.09864, section 3.2.2), changed by
    `config.rope_scaling`.
    """
    exponents = jnp.arange(0, config.head_size, 2, dtype=jnp.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None  # checked by RopeScaling
    # Full turns of each pair within a sequence of the pretraining. A frequency with at most `low`
    # turns is divided, and one with at least `high` turns is kept.
    turns = original * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotate(
    x_BxTxNxH: Float[Array, "batch seq heads features"], angles_BxTxF: Angles
) -> Float[Array, "batch seq heads features"]:
    """Rotates the pairs (i, i + head_dim / 2) of the features of every head, in float32.

    These are the pairs of Hugging Face's checkpoints. Those of the original LLaMA are (2i, 2i + 1).

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> print(rotate(x, jnp.full((1, 1, 1), jnp.pi / 2)).ravel().round(3))
        [-0.  1.]
    """
    cos, sin = jnp.cos(angles_BxTxF)[:, :, None], jnp.sin(angles_BxTxF)[:, :, None]
    first, second = jnp.split(x_BxTxNxH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)
