"""The variable types of adapted NNX models, and the arrays of NNX nodes by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import flatten
from dora_jax.errors import Path


class DoRAParam(nnx.Variable):
    """What DoRA trains: differentiate and optimise with `wrt=DoRAParam`.

    It is no `nnx.Param`, so that `nnx.state(model, nnx.Param)` still is the base model's.
    """


class SavedParam(DoRAParam, nnx.Param):
    """A parameter of a module in `modules_to_save`: of the base model, and trained in full."""


class BaseParam(nnx.Variable):
    """What an adapted layer keeps of its frozen kernel: derived from the base, never trained."""


# The names of their collections where nnx.bridge takes them to Linen; "dora" as in a `DoRAModel`.
nnx.register_variable_name("dora", DoRAParam)
nnx.register_variable_name("dora_base", BaseParam)
M = TypeVar("M", bound=nnx.Module)


def retype_parameters(module: nnx.Module, old: type, new: type) -> None:
    """Changes the type of every variable of exactly type `old` inside a module, in place."""
    for _, node in nnx.iter_graph(module):
        if type(node) is old:
            object.__setattr__(node, "__class__", new)


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
