"""How each Flax layer class uses its kernel, and what an adapted layer computes.

A `Layout` says which axes of a kernel are stacked, contracted and output, and how the layer
multiplies by the low-rank factors; one serves a Linen layer and its NNX namesake. Neither front end
is known here.
"""

from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.layers.einsum import einsum_layout
from dora_jax.layers.layout import Layout
from dora_jax.layers.registry import find_layout, register_layout

__all__ = [
    "AdaptedLayer",
    "Layout",
    "einsum_layout",
    "find_layout",
    "register_layout",
]
