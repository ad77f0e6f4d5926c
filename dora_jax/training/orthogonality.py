"""The penalty that keeps the components of an adapter apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dora_jax.adapters.components import low_rank_layers
from dora_jax.training.sensitivity import Axes, component_shape

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def orthogonality_penalty(adapters: Any, axes: Axes | None = None) -> Float[Array, ""]:
    """Returns the sum over all kernels of the squared cosines between two columns of A, float32.

    It is `||C - I||_F^2` with the matrix C of cosines, so that each pair counts twice. Add it to
    the loss times a small number (AdaLoRA, arXiv 2303.10512, section 3.1, has 0.1 to 0.5). The
    paper has inner products in place of cosines, and those of rows of B too: the head of
    `training/adaptive_rank.py` says why not here. A column of zeros has the cosine 0 with all.
    Every layer of a stack has its own columns. An adapter with `init="orthogonal"` starts at 0.

    Args:
      adapters: an adapter tree, or a state of NNX variables.
      axes: as for `adaptive_rank`.

    Example:
      >>> b = jnp.zeros((2, 3))
      >>> one = {"lora_a": jnp.array([[1.0, 0.0], [0.0, 5.0]]), "lora_b": b}
      >>> two = {"lora_a": jnp.array([[1.0, 1.0], [0.0, 1.0]]), "lora_b": b}
      >>> [round(float(orthogonality_penalty({"up": layer})), 3) for layer in (one, two)]
      [0.0, 1.0]
    """
    total = jnp.zeros((), jnp.float32)
    for path, layer in low_rank_layers(adapters).items():
        shape = component_shape(path, layer, axes)
        a = jnp.reshape(layer.lora_a, (*shape[:-1], -1, shape[-1])).astype(jnp.float32)
        products = jnp.einsum("...ir,...is->...rs", a, a, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.sum(jnp.square(a), -2)
        lengths = squares[..., :, None] * squares[..., None, :]
        cosines = jnp.square(products) / jnp.where(lengths > 0, lengths, 1)
        total += jnp.sum(cosines * (1 - jnp.eye(shape[-1], dtype=jnp.float32)))
    return total
