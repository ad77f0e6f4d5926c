"""`apply_dora` and `merge` for either front end: Linen and NNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen, nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError


def apply_dora(model: Any, config: DoRAConfig, **kwargs: Any) -> Any:
    """Adapts the selected layers of a Flax model; it computes the same as before, bit for bit.

    For an `nnx.Module`: `apply_dora(model, config, rngs=...) -> model`, see
    `dora_jax.nnx.apply_dora`. For a `linen.Module`: `apply_dora(model, config, params=..., rng=...,
    inputs=(...)) -> (model, adapters)`, see `dora_jax.linen.apply_dora`.

    Raises:
      TypeError: `model` is of neither kind, or another argument of a wrong one.
      DoRAError: see the function of the front end.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1)).lora_a.shape
      (4, 2)
    """
    if not isinstance(config, DoRAConfig):
        raise TypeError(f"expected a DoRAConfig, got {type(config)}")
    if not isinstance(kwargs.get("inputs"), (tuple, list, type(None))):
        raise TypeError("inputs must be a tuple of the call's arguments, as in inputs=(x,)")
    if isinstance(model, nnx.Module):
        return dora_nnx.apply_dora(model, config, **kwargs)
    if isinstance(model, (linen.Module, dora_linen.DoRAModel)):
        return dora_linen.apply_dora(model, config, **kwargs)
    raise TypeError(f"expected a flax.nnx.Module or a flax.linen.Module, got {type(model)}")


def merge(model_or_params: Any, adapters: Any = None, config: Any = None) -> Any:
    """Folds the adapters into the kernels.

    `merge(model)` returns an NNX model with plain layers, see `dora_jax.nnx.merge`;
    `merge(params, adapters, config)` returns Linen parameters, see `dora_jax.linen.merge`.

    Raises:
      TypeError: neither an NNX model alone nor all three for Linen are given.
      AdapterError: there is nothing to merge, or the parts do not belong together.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> bool((dora.merge(adapted).kernel[...] == model.kernel[...]).all())
      True
    """
    if isinstance(model_or_params, nnx.Module):
        if adapters is not None or config is not None:
            raise TypeError("merge(model) takes an NNX model alone: it carries its adapters")
        return dora_nnx.merge(model_or_params)
    of_linen = isinstance(model_or_params, Mapping) and isinstance(adapters, Mapping)
    if not (of_linen and isinstance(config, (DoRAConfig, dora_linen.DoRAModel))):
        raise TypeError(
            "merge takes an NNX model, or params, adapters and config (or the DoRAModel) of a "
            "Linen one"
        )
    if not adapters:
        raise AdapterError("the adapter tree is empty: nothing to merge")
    return dora_linen.merge(model_or_params, adapters, config)


def precompute_scales(model: Any, params: Any = None, adapters: Any = None) -> Any:
    """Computes every layer's scale once, ahead of the calls that use it.

    `precompute_scales(model)` returns an NNX model, see `dora_jax.nnx.precompute_scales`; `precompute_scales(model, params, adapters)`
    returns an adapter tree for a Linen one, see `dora_jax.linen.precompute_scales`.
    """
    if _front_end(model, params=params, adapters=adapters) is dora_nnx:
        return dora_nnx.precompute_scales(model)
    return dora_linen.precompute_scales(model, params, adapters)


def disabled_adapters(model: Any, adapters: Any = None) -> Any:
    """Returns the adapter tree with which an adapted model computes what its base computes.

    `disabled_adapters(model)` for NNX, see `dora_jax.nnx.disabled_adapters`;
    `disabled_adapters(model, adapters)` for Linen, see `dora_jax.linen.disabled_adapters`.
    """
    if _front_end(model, adapters=adapters) is dora_nnx:
        return dora_nnx.disabled_adapters(model)
    return dora_linen.disabled_adapters(model, adapters)


def apply_mixed(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Applies an adapted model to a batch in which every example has an adapter of its own.

    `apply_mixed(model, stacked, index, *inputs)` for NNX, see `dora_jax.nnx.apply_mixed`;
    `apply_mixed(model, variables, index, *inputs)` for Linen, see `dora_jax.linen.apply_mixed`.
    """
    return _front_end(model).apply_mixed(model, *args, **kwargs)


def check_base(model: Any, params: Any = None) -> None:
    """Raises `AdapterError` if a frozen kernel is not the one its adapter was made for.

    `check_base(model)` for NNX; `check_base(model, params)` for Linen.
    """
    if _front_end(model, params=params) is dora_nnx:
        dora_nnx.check_base(model)
    else:
        dora_linen.check_base(model, params)


def _front_end(model: Any, **of_linen: Any) -> Any:
    """Returns the functions for an adapted model, `dora_nnx` or `dora_linen`.

    `of_linen` are arguments that a Linen model needs and an NNX model, which carries them, refuses.
    """
    if isinstance(model, nnx.Module):
        if given := [name for name, value in of_linen.items() if value is not None]:
            raise TypeError(f"an NNX model carries its arrays: leave out {', '.join(given)}")
        return dora_nnx
    if isinstance(model, dora_linen.DoRAModel):
        if missing := [name for name, value in of_linen.items() if value is None]:
            raise TypeError(f"a Linen model needs {', '.join(missing)} too")
        return dora_linen
    if isinstance(model, linen.Module):
        raise AdapterError("the module is not adapted: give the DoRAModel that apply_dora returned")
    raise TypeError(f"expected an adapted flax.nnx.Module or a DoRAModel, got {type(model)}")
