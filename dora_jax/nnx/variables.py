"""The variable types of adapted NNX models, and the arrays of NNX nodes by path."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from flax import nnx

from dora_jax.adapters.placement import device_put_like, native, own_array
from dora_jax.adapters.trees import flatten
from dora_jax.decomposition.quantized import QuantizedKernel
from dora_jax.errors import Path
from dora_jax.layers.quantizing import refuse_training_in_full


class DoRAParam(nnx.Variable):
    """What DoRA trains: differentiate and optimise with `wrt=DoRAParam`.

    It is no `nnx.Param`, so that `nnx.state(model, nnx.Param)` still is the base model's.
    """


class SavedParam(DoRAParam, nnx.Param):
    """A parameter of a module in `modules_to_save`: of the base model, and trained in full.

    Attributes:
      plain_class: its class in the base; of a subclass of `nnx.Param` see `saved_class`.
    """

    plain_class: ClassVar[type[nnx.Param]] = nnx.Param

    def __reduce__(self) -> tuple[Any, ...]:
        # `pickle` finds a class by its name, and `saved_class` makes classes that have none.
        return _new_saved, (self.plain_class,), self.__getstate__()


class BaseParam(nnx.Variable):
    """What an adapted layer keeps of its frozen kernel: derived from the base, never trained."""


# What a call of a model changes: counters of random streams, running means, caches.
_CHANGING = (nnx.RngState, nnx.BatchStat, nnx.Cache)
# The names of their collections where nnx.bridge takes them to Linen; "dora" as in a `DoRAModel`.
nnx.register_variable_name("dora", DoRAParam)
nnx.register_variable_name("dora_base", BaseParam)
M = TypeVar("M", bound=nnx.Module)


def copy_model(model: M) -> M:
    """Returns a copy of a model with variables of its own.

    Parameters that are not trained hold the same arrays as the model's. Everything else is copied:
    what DoRA trains, and what a call changes, so that donating these leaves the model whole.
    """
    copy = nnx.merge(*nnx.split(model), copy=True)
    for _, variable in nnx.iter_graph(copy):
        if isinstance(variable, nnx.Variable):
            value = variable.get_value()
            own = jax.tree.map(functools.partial(_own_value, type(variable)), value)
            if own is not value:
                variable.set_value(own)
    return copy


def _own_value(kind: type[nnx.Variable], x: Any) -> Any:
    """Returns what a copied variable holds in place of an array."""
    if issubclass(kind, (DoRAParam, *_CHANGING)):
        return own_array(x)
    if not isinstance(x, np.ndarray):
        return x
    if not issubclass(kind, nnx.Param | BaseParam):
        return own_array(x)
    # Flax writes `variable[...] = y` into a NumPy array, which would change the model's own.
    shared = native(x).view()
    shared.flags.writeable = False
    return shared


@functools.cache
def saved_class(plain: type[nnx.Param]) -> type[SavedParam]:
    """Returns the class of a parameter trained in full: of DoRA's, and of its own."""
    if plain is nnx.Param:
        return SavedParam
    return type(
        f"Saved{plain.__name__}",
        (SavedParam, plain),
        {"plain_class": plain, "__module__": __name__},
    )


def _new_saved(plain: type[nnx.Param]) -> SavedParam:
    return object.__new__(saved_class(plain))


def train_parameters(path: Path, node: Any) -> None:
    """Makes every parameter of a module, or one parameter, trained in full, in place.

    Its array becomes a copy, so that the base it came from is left whole.

    Raises:
      AdapterError: it is quantised; names `path`.
    """
    for parameter in _parameters(node):
        if isinstance(parameter.get_value(), QuantizedKernel):
            raise refuse_training_in_full(path)
        if not isinstance(parameter, SavedParam):
            object.__setattr__(parameter, "__class__", saved_class(type(parameter)))
            parameter.set_value(jax.tree.map(own_array, parameter.get_value()))


def restore_parameters(model: nnx.Module) -> None:
    """Gives parameters that are trained in full their own classes again, in place."""
    for parameter in _parameters(model):
        if isinstance(parameter, SavedParam):
            object.__setattr__(parameter, "__class__", parameter.plain_class)


def _parameters(node: Any) -> Iterator[nnx.Param]:
    nodes = [node] if isinstance(node, nnx.Variable) else [own for _, own in nnx.iter_graph(node)]
    return (own for own in nodes if isinstance(own, nnx.Param))


def nnx_values(node: Any, only: Any = ...) -> dict[Path, Any]:
    """Returns the arrays of the variables of an NNX node that a filter selects, by path."""
    values = {}
    for path, variable in nnx.to_flat_state(nnx.state(node, only)):
        # One array as a rule; a masked part of an optimiser's state has none.
        for tail, value in flatten(variable.get_value()).items():
            values[(*map(str, path), *tail)] = value
    return values


def set_nnx_values(node: Any, only: Any, values: Mapping[Path, Any]) -> None:
    """Puts arrays into the variables of an NNX node, in their dtype, placed as what was there.

    Variables of paths that `values` does not have stay as they are.
    """
    state = nnx.state(node, only)
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        leaves = [
            device_put_like(values[name], leaf)
            if (name := (*map(str, path), *tail)) in values
            else leaf
            for tail, leaf in flatten(value).items()
        ]
        if leaves:
            variable.set_value(jax.tree.unflatten(jax.tree.structure(value), leaves))
    nnx.update(node, state)
