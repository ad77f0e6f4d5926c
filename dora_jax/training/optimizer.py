"""The DoRA optimiser: low-rank factors and magnitude, each with its own learning rate."""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
import optax
from flax import nnx

from dora_jax.adapters.groups import label_adapters
from dora_jax.errors import AdapterError, ConfigError
from dora_jax.nnx.variables import DoRAParam


def dora_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    magnitude_lr_ratio: optax.ScalarOrSchedule = 3.0,
    lora_b_lr_ratio: optax.ScalarOrSchedule = 1.0,
    weight_decay: float = 0.0,
    magnitude_weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    optimizer: Callable[..., optax.GradientTransformation] | None = None,
) -> optax.GradientTransformation:
    """An `optax.multi_transform` that gives each kind of adapter array its own learning rate.

    The magnitude holds numbers near a column's norm; the low-rank factors start at or near zero.
    One learning rate seldom suits both. Give it the adapters alone, because it trains every array
    that it gets: `wrt=DoRAParam` in NNX, the adapter tree in Linen. For other groups, pass
    `dora_jax.adapters.label_adapters` to `optax.multi_transform`.

    Args:
      learning_rate: of `lora_a` and of modules trained in full; a number or a schedule.
      magnitude_lr_ratio: learning rate of the magnitude over `learning_rate`: a number, or a
        function of the step for a schedule of the magnitude's own.
      lora_b_lr_ratio: the same ratio for `lora_b` (LoRA+, arXiv 2402.12354).
      weight_decay: decoupled decay of all arrays except magnitudes.
      magnitude_weight_decay: decoupled decay of magnitudes.
      max_grad_norm: clips the norm of all gradients together; None does not clip.
      optimizer: called as `optimizer(learning_rate=..., weight_decay=...)` for each group; None is
        `optax.adamw`. `optax.inject_hyperparams` needs it among its `static_args`.

    Raises:
      ConfigError: a learning rate, ratio, decay or norm is negative or no finite number.
      AdapterError: from `init`, if the tree holds frozen kernels. A Linen tree without an adapter
        may be of `modules_to_save` alone, so that `init` warns.

    Example:
      >>> import jax.numpy as jnp
      >>> adapters = {"query": {"lora_a": jnp.ones(2), "magnitude": jnp.ones(2)}}
      >>> warm_up = optax.linear_schedule(1.0, 3.0, 100)
      >>> for ratio in (3.0, warm_up):
      ...     tx = dora_optimizer(0.1, magnitude_lr_ratio=ratio)
      ...     updates, _ = tx.update(adapters, tx.init(adapters), adapters)
      ...     print({name: f"{u[0]:.1f}" for name, u in updates["query"].items()})
      {'lora_a': '-0.1', 'magnitude': '-0.3'}
      {'lora_a': '-0.1', 'magnitude': '-0.1'}
    """
    _check_rates(learning_rate, magnitude_lr_ratio, lora_b_lr_ratio)
    _check_limits(weight_decay, magnitude_weight_decay, max_grad_norm)
    rates = {
        "lora_a": learning_rate,
        "lora_b": _times(learning_rate, lora_b_lr_ratio),
        "magnitude": _times(learning_rate, magnitude_lr_ratio),
        "saved": learning_rate,
    }
    decays = dict.fromkeys(rates, weight_decay) | {"magnitude": magnitude_weight_decay}
    make = _checked_optimizer(optimizer)
    groups = optax.multi_transform(
        {k: make(learning_rate=rates[k], weight_decay=decays[k]) for k in rates}, label_adapters
    )
    if max_grad_norm is not None:
        groups = optax.chain(optax.clip_by_global_norm(max_grad_norm), groups)
    return groups._replace(init=functools.partial(_init, groups.init))


def _init(init: Callable[[Any], Any], params: Any) -> Any:
    _check_trained(params)
    return init(params)


def _check_trained(params: Any) -> None:
    """Checks that a tree without an adapter is of modules trained in full, as far as it shows."""
    if set(jax.tree.leaves(label_adapters(params))) != {"saved"}:
        return
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if any(isinstance(leaf, nnx.Variable) and not isinstance(leaf, DoRAParam) for leaf in leaves):
        raise AdapterError(
            "no adapter among the parameters to optimise: give wrt=DoRAParam, not the base's "
            "parameters"
        )
    if not any(isinstance(leaf, nnx.Variable) for leaf in leaves):
        warnings.warn(
            "no adapter among the parameters to optimise: all of them are trained in full. That is "
            "right if modules_to_save alone names modules; else give the adapter tree, not params",
            stacklevel=3,
        )


def _checked_optimizer(optimizer: Any) -> Callable[..., optax.GradientTransformation]:
    """Returns the function that makes each group's optimiser."""
    if optimizer is None:
        return optax.adamw
    if not callable(optimizer):
        raise ConfigError(
            f"optimizer must be a function such as optax.adamw, got {type(optimizer).__name__}. "
            "Under optax.inject_hyperparams pass static_args=('optimizer',)"
        )
    return cast("Callable[..., optax.GradientTransformation]", optimizer)


def _check_rates(learning_rate: Any, magnitude_lr_ratio: Any, lora_b_lr_ratio: Any) -> None:
    if not (callable(learning_rate) or _is_allowed(learning_rate)):
        raise ConfigError(
            f"learning_rate must be a schedule or a number of at least 0, got {learning_rate!r}"
        )
    ratios = {"magnitude_lr_ratio": magnitude_lr_ratio, "lora_b_lr_ratio": lora_b_lr_ratio}
    for name, ratio in ratios.items():
        if not (callable(ratio) or _is_allowed(ratio)):
            raise ConfigError(f"{name} must be at least 0, got {ratio}")


def _check_limits(weight_decay: Any, magnitude_weight_decay: Any, max_grad_norm: Any) -> None:
    decays = {"weight_decay": weight_decay, "magnitude_weight_decay": magnitude_weight_decay}
    for name, decay in decays.items():
        if not _is_allowed(decay):
            raise ConfigError(f"{name} must be at least 0, got {decay}")
    if max_grad_norm is not None and not _is_allowed(max_grad_norm, zero=False):
        raise ConfigError(f"max_grad_norm must be above 0, or None, got {max_grad_norm}")


def _is_allowed(value: Any, *, zero: bool = True) -> bool:
    """Returns whether an option is a finite number of at least 0, or above it."""
    if isinstance(value, jax.Array):  # traced perhaps, as by optax.inject_hyperparams
        return True
    in_range = isinstance(value, numbers.Real) and 0 <= float(value) < math.inf
    return in_range and (zero or value != 0)


def _times(rate: optax.ScalarOrSchedule, ratio: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    """Returns a rate times a ratio, a schedule if either of them is one."""
    if not callable(rate) and not callable(ratio):
        return rate * ratio

    def at(value: optax.ScalarOrSchedule, step: Any) -> Any:
        return value(step) if callable(value) else value

    return lambda step: at(ratio, step) * at(rate, step)
