"""The DoRA optimiser: low-rank factors and magnitude, each with its own learning rate."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import optax

from dora_jax.adapters.groups import label_adapters
from dora_jax.errors import ConfigError


def dora_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    magnitude_lr_ratio: float = 3.0,
    lora_b_lr_ratio: float = 1.0,
    magnitude_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    magnitude_weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformation:
    """An `optax.multi_transform` that gives each kind of adapter array its own learning rate.

    The magnitude is a vector of numbers near a column's norm, the low-rank factors are matrices
    that start at or near zero: one learning rate seldom suits both. Use it for adapters alone:
    what it is given, it trains (`wrt=DoRAParam` in NNX, the adapter tree in Linen).

    Args:
      learning_rate: of `lora_a` and of modules trained in full; a number or a schedule.
      magnitude_lr_ratio: learning rate of the magnitude over `learning_rate`.
      lora_b_lr_ratio: learning rate of `lora_b` over `learning_rate` (LoRA+, arXiv 2402.12354).
      magnitude_learning_rate: a learning rate or schedule of the magnitude's own, instead of the
        ratio.
      weight_decay: decoupled decay of everything but the magnitude.
      magnitude_weight_decay: decoupled decay of the magnitude.
      max_grad_norm: clips the norm of all gradients together; None does not clip.
      optimizer: called as `optimizer(learning_rate=..., weight_decay=...)` for each group.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ConfigError: a learning rate, ratio, decay or norm is negative or no finite number.
      AdapterError: from `init`, if the tree holds the frozen kernels, or no adapter.

    Example:
      >>> import jax.numpy as jnp
      >>> adapters = {"query": {"lora_a": jnp.ones(2), "magnitude": jnp.ones(2)}}
      >>> tx = dora_optimizer(0.1, magnitude_lr_ratio=3.0, max_grad_norm=None)
      >>> updates, _ = tx.update(adapters, tx.init(adapters), adapters)
      >>> jax.tree.map(lambda u: round(float(u[0]), 4), updates)
      {'query': {'lora_a': -0.1, 'magnitude': -0.3}}
    """
    for name, value in (
        ("magnitude_lr_ratio", magnitude_lr_ratio),
        ("lora_b_lr_ratio", lora_b_lr_ratio),
        ("weight_decay", weight_decay),
        ("magnitude_weight_decay", magnitude_weight_decay),
    ):
        if not _allows(value):
            raise ConfigError(f"{name} must be at least 0, got {value}")
    for name, rate in (
        ("learning_rate", learning_rate),
        ("magnitude_learning_rate", magnitude_learning_rate),
    ):
        if not (rate is None or callable(rate) or _allows(rate)):
            raise ConfigError(f"{name} must be a schedule or a number of at least 0, got {rate!r}")
    if max_grad_norm is not None and not _allows(max_grad_norm, zero=False):
        raise ConfigError(f"max_grad_norm must be above 0, or None, got {max_grad_norm}")
    if magnitude_learning_rate is None:
        magnitude_learning_rate = _times(learning_rate, magnitude_lr_ratio)

    def group(rate: optax.ScalarOrSchedule, decay: float) -> optax.GradientTransformation:
        return optimizer(learning_rate=rate, weight_decay=decay)

    groups = optax.multi_transform(
        {
            "lora_a": group(learning_rate, weight_decay),
            "lora_b": group(_times(learning_rate, lora_b_lr_ratio), weight_decay),
            "magnitude": group(magnitude_learning_rate, magnitude_weight_decay),
            "saved": group(learning_rate, weight_decay),
        },
        label_adapters,
    )
    if max_grad_norm is None:
        return groups
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), groups)


def _allows(value: Any, *, zero: bool = True) -> bool:
    """Whether an option is a finite number of at least 0, or above it."""
    if isinstance(value, jax.Array):  # traced perhaps, as by optax.inject_hyperparams
        return True
    in_range = isinstance(value, numbers.Real) and 0 <= float(value) < math.inf
    return in_range and (zero or value != 0)


def _times(rate: optax.ScalarOrSchedule, ratio: float) -> optax.ScalarOrSchedule:
    if callable(rate):
        return lambda step: ratio * rate(step)
    return ratio * rate
