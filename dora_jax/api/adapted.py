"""Models that are adapted, merged and checked, of either front end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import jax
from flax import linen, nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.trees import Tree
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError
from dora_jax.linen import DoRAModel, ExampleCall
from dora_jax.nnx.variables import M


@overload
def apply_dora(
    model: M, config: DoRAConfig, *, rngs: nnx.Rngs, inputs: Sequence[Any] | None = None
) -> M: ...


@overload
def apply_dora(
    model: linen.Module,
    config: DoRAConfig,
    *,
    params: Tree,
    rng: jax.Array,
    inputs: Sequence[Any] | ExampleCall,
) -> tuple[DoRAModel, dict[str, Any]]: ...


def apply_dora(
    model: Any,
    config: DoRAConfig,
    *,
    rngs: Any = None,
    params: Any = None,
    rng: Any = None,
    inputs: Any = None,
) -> Any:
    """Adapts the selected layers of a Flax model; it computes the same as before, bit for bit.

    Args:
      model: an `nnx.Module`, see `dora_jax.nnx.apply_dora`; or a `linen.Module`, see
        `dora_jax.linen.apply_dora`. It stays as it is.
      config: which layers, and how.
      rngs: NNX: draws `lora_a`, and serves the adapters' dropout.
      params: Linen: the module's `params` collection.
      rng: Linen: draws `lora_a`.
      inputs: arguments of an example call, which is traced, not run. Needed for Linen.

    Returns:
      NNX: the adapted model. Linen: a `DoRAModel` and the adapter tree.

    Raises:
      TypeError: `model` is of neither kind, or an argument is missing or of a wrong type.
      DoRAError: see the function of the front end.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1)).lora_a.shape
      (4, 2)
    """
    if not isinstance(config, DoRAConfig):
        raise TypeError(f"expected a DoRAConfig, got {type(config)}")
    if not isinstance(inputs, (tuple, list, ExampleCall, type(None))):
        raise TypeError("inputs must be a tuple of the call's arguments, as in inputs=(x,)")
    if isinstance(model, nnx.Module):
        if isinstance(inputs, ExampleCall):
            raise TypeError("an ExampleCall is for Linen: give an NNX model a tuple of arguments")
        _refuse("an NNX model carries its arrays, and takes rngs", params=params, rng=rng)
        return dora_nnx.apply_dora(model, config, rngs=rngs, inputs=inputs)
    if isinstance(model, (linen.Module, DoRAModel)):
        _refuse("a Linen module takes rng, a key", rngs=rngs)
        _require("a Linen module", params=params, rng=rng, inputs=inputs)
        assert inputs is not None
        return dora_linen.apply_dora(model, config, params=params, rng=rng, inputs=inputs)
    raise TypeError(f"expected a flax.nnx.Module or a flax.linen.Module, got {type(model)}")


@overload
def merge(model: M, *, into: str | M = "dequantized") -> M: ...


@overload
def merge(
    model: DoRAModel, params: Tree, adapters: Tree, *, into: str | Tree = "dequantized"
) -> dict[str, Any]: ...


def merge(
    model: Any, params: Any = None, adapters: Any = None, *, into: Any = "dequantized"
) -> Any:
    """Folds the adapters into the kernels.

    Args:
      model: an adapted NNX model, see `dora_jax.nnx.merge`; or the `DoRAModel` of a Linen one, see
        `dora_jax.linen.merge`.
      params: Linen: the base's parameters.
      adapters: Linen: the adapter tree.
      into: of a quantised base: "dequantized" merges into the dequantised kernels, which is what
        was trained; "requantized" quantises the result again; the model or the parameters that were
        quantised have their kernels merged. A warning says what the latter two lose.

    Returns:
      NNX: a model with plain layers. Linen: parameters for the plain module.

    Raises:
      TypeError: the arguments are those of neither front end.
      AdapterError: there is nothing to merge, or the parts do not belong together.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> bool((dora.merge(adapted).kernel[...] == model.kernel[...]).all())
      True
    """
    if _is_nnx(model, params=params, adapters=adapters):
        return dora_nnx.merge(model, into)
    return dora_linen.merge(model, params, adapters, into)


@overload
def precompute_scales(model: M) -> M: ...


@overload
def precompute_scales(model: DoRAModel, params: Tree, adapters: Tree) -> dict[str, Any]: ...


def precompute_scales(model: Any, params: Any = None, adapters: Any = None) -> Any:
    """Computes every layer's scale once, ahead of the calls that use it.

    Returns:
      NNX: a model, see `dora_jax.nnx.precompute_scales`. Linen: an adapter tree, see
      `dora_jax.linen.precompute_scales`.
    """
    if _is_nnx(model, params=params, adapters=adapters):
        return dora_nnx.precompute_scales(model)
    return dora_linen.precompute_scales(model, params, adapters)


@overload
def disabled_adapters(model: nnx.Module) -> dict[str, Any]: ...


@overload
def disabled_adapters(model: DoRAModel, adapters: Tree) -> dict[str, Any]: ...


def disabled_adapters(model: Any, adapters: Any = None) -> Any:
    """Returns the adapter tree with which an adapted model computes what its base computes.

    See `dora_jax.nnx.disabled_adapters` and `dora_jax.linen.disabled_adapters`.
    """
    if _is_nnx(model, adapters=adapters):
        return dora_nnx.disabled_adapters(model)
    return dora_linen.disabled_adapters(model, adapters)


def apply_mixed(model: Any, adapters: Tree, index: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Applies an adapted model to a batch in which every example has an adapter of its own.

    Args:
      model: the adapted model.
      adapters: NNX: adapter trees, stacked by `dora_jax.adapters.stack_adapters`, see
        `dora_jax.nnx.apply_mixed`. Linen: all collections, `dora` among them stacked, see
        `dora_jax.linen.apply_mixed`.
      index: which adapter each example uses, int `(batch,)`.
      *inputs: of the model, arrays with a leading batch axis.
      **kwargs: further arguments of the model, the same for every example.
    """
    if _is_nnx(model):
        return dora_nnx.apply_mixed(model, adapters, index, *inputs, **kwargs)
    return dora_linen.apply_mixed(model, adapters, index, *inputs, **kwargs)


@overload
def check_base(model: nnx.Module) -> None: ...


@overload
def check_base(model: DoRAModel, params: Tree) -> None: ...


def check_base(model: Any, params: Any = None) -> None:
    """Raises `AdapterError` if a frozen kernel is not the one its adapter was made for."""
    if _is_nnx(model, params=params):
        dora_nnx.check_base(model)
    else:
        dora_linen.check_base(model, params)


@overload
def shardings(model: nnx.Module) -> dict[str, Any]: ...


@overload
def shardings(model: DoRAModel, params: Tree) -> dict[str, Any]: ...


def shardings(model: Any, params: Any = None) -> dict[str, Any]:
    """Returns where the adapters of a model lie on a mesh: a tree like theirs, of shardings.

    They follow from the shardings of the frozen kernels, and are what `apply_dora` gives them. See
    `dora_jax.nnx.shardings` and `dora_jax.linen.shardings`, and `optimizer_shardings` for moments.
    """
    if _is_nnx(model, params=params):
        return dora_nnx.shardings(model)
    return dora_linen.shardings(model, params)


def _is_nnx(model: Any, **of_linen: Any) -> bool:
    """Returns whether an adapted model is an NNX one rather than a `DoRAModel`.

    `of_linen` are arguments that a Linen model needs and an NNX model, which carries them, refuses.
    """
    if isinstance(model, nnx.Module):
        _refuse("an NNX model carries its arrays", **of_linen)
        return True
    if isinstance(model, DoRAModel):
        _require("a Linen model", **of_linen)
        return False
    if isinstance(model, linen.Module):
        raise AdapterError("the module is not adapted: give the DoRAModel that apply_dora returned")
    raise TypeError(f"expected an adapted flax.nnx.Module or a DoRAModel, got {type(model)}")


def _refuse(reason: str, **arguments: Any) -> None:
    if given := [name for name, value in arguments.items() if value is not None]:
        raise TypeError(f"{reason}: leave out {', '.join(given)}")


def _require(what: str, **arguments: Any) -> None:
    if missing := [name for name, value in arguments.items() if value is None]:
        raise TypeError(f"{what} needs {', '.join(missing)} too")
