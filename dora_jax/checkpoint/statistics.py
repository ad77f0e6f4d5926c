"""Batch statistics, such as running means: part of an adapter that trains their module in full.

An NNX model carries them, so that they are saved and loaded with it. A Linen model has them in a
collection of its own, `batch_stats`, which the adapter tree does not hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dora_jax.adapters.trees import check_shapes, nest
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, Path, layer_name, listing
from dora_jax.model import STATISTICS, AdaptedModel, carries_arrays, mutable_arrays
from dora_jax.selection import is_in_saved_module


def check_statistics_given(model: AdaptedModel | None, given: Iterable[Path], how: str) -> None:
    """Raises `AdapterError` if batch statistics of a Linen model are left out; names the module.

    They belong to an adapter that trains the module with the statistics in full.

    Args:
      model: an adapted model. An NNX model carries its statistics, so that none can be left out.
      given: the paths of the arrays that are saved, or have been, in whatever collection.
      how: they can be given.
    """
    given = list(given)
    for path in () if model is None or carries_arrays(model) else model.statistics:
        if not any(other[-len(path) :] == path for other in given):
            raise AdapterError(
                f"{layer_name(path[:-1])} is trained in full, and its batch statistics are in a "
                f"collection of their own: {how}, or leave it out of modules_to_save"
            )


def statistics_to_load(
    model: AdaptedModel,
    config: DoRAConfig,
    saved: Mapping[Path, Any],
    is_loaded: Callable[[Path], bool],
) -> dict[Path, Any]:
    """Returns the statistics to put into an NNX model, by path; none for a Linen model.

    Args:
      model: an adapted model.
      config: of the adapters.
      saved: the statistics that were saved with them.
      is_loaded: whether the adapters of a module are loaded.

    Raises:
      AdapterError: those of a module trained in full were not saved, or the model has others.

    Warns:
      UserWarning: a Linen model is to be applied with these statistics, not with its base's.
    """
    values = {path: x for path, x in saved.items() if is_loaded(path[:-1])}
    own = mutable_arrays(model, STATISTICS) if carries_arrays(model) else model.statistics
    for path in own:
        if is_loaded(path[:-1]) and is_in_saved_module(config, path) and path not in values:
            raise AdapterError(
                f"{layer_name(path[:-1])} was trained in full, and the adapters were saved without "
                "its batch statistics: save them with the model, or in Linen with "
                "statistics=variables['batch_stats']; a step of Checkpoints is restored by it"
            )
    if carries_arrays(model):
        check_shapes(nest(values), {path: np.shape(own[path]) for path in values if path in own})
        return values
    if values:
        names = sorted({layer_name(path[:-1]) for path in values})
        warnings.warn(
            f"the adapters have batch statistics of {listing(names)}: apply the model with those "
            "of read_adapters(path).statistics, not with the base's",
            stacklevel=3,
        )
    return {}
