"""Inputs of the models: the types of token ids and masks, and a check of their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Int, Shaped

    # Batches may be NumPy arrays. A mask may hold integers, booleans or floats.
    Ids = Int[Array | np.ndarray, "batch seq"]
    Mask = Shaped[Array | np.ndarray, "batch seq"]


def check_shapes(input_ids: Any, **others: Any) -> None:
    """Checks that all inputs are `(batch, seq)` and of one shape.

    Args:
        input_ids: Token ids.
        others: Further inputs by name; None if an input is not given.

    Raises:
        ValueError: The shapes differ, or `input_ids` has not two axes. Names the input.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, seq), not of shape {input_ids.shape}.")
    for name, array in others.items():
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {array.shape}; give it input_ids' shape {input_ids.shape}."
            )
