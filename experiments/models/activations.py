"""Activation functions under Hugging Face's names."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""By the values of `hidden_act` that are implemented."""
