"""With which settings adapter arrays were trained, as far as that is known.

An adapter tree is a plain tree of arrays, and does not say which alpha it was trained with. So the
arrays that an adapted model or a file hands out are remembered for as long as they live, and a
model of other settings refuses them. Arrays that were computed from these, as by an optimiser, are
not known: they count as the model's own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dora_jax.config import OUTPUT_FIELDS, LayerSettings
from dora_jax.errors import AdapterError, Path, layer_name

# What is remembered of an array: the settings that the layer's output depends on, by name.
Origin = Mapping[str, Any]
_origins: dict[int, tuple[weakref.ref[Any], Origin]] = {}


def origin(settings: LayerSettings, *, changes_product: bool) -> Origin:
    """Returns what is remembered of a layer's arrays.

    Args:
      settings: the layer's settings.
      changes_product: whether `lora_a lora_b` did not start at zero.
    """
    fields = {field: getattr(settings, field) for field in OUTPUT_FIELDS}
    return {**fields, "changes_product": changes_product}


def remember(flat: Mapping[Path, Any], origins: Mapping[Path, Origin]) -> None:
    """Remembers the origin of the arrays of an adapter tree.

    Args:
      flat: the arrays by path.
      origins: of the layers, by path.
    """
    for path, own in origins.items():
        x = flat.get((*path, "lora_b"))
        if isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer):
            forget = functools.partial(_forget, id(x))
            _origins[id(x)] = (weakref.ref(x, forget), own)


def _forget(key: int, _: Any) -> None:
    _origins.pop(key, None)


def origin_of(x: Any) -> Origin | None:
    """Returns the origin of a `lora_b`; None if it is not known."""
    reference, own = _origins.get(id(x), (lambda: None, None))
    return own if reference() is x else None


def check_origin(flat: Mapping[Path, Any], origins: Mapping[Path, Origin]) -> None:
    """Raises `AdapterError` if arrays are known to be of other settings; names layer and setting.

    Args:
      flat: the arrays of an adapter tree, by path.
      origins: what is wanted of the layers, by path.
    """
    for path, wanted in origins.items():
        own = origin_of(flat.get((*path, "lora_b"))) or wanted
        for field in wanted:
            if own[field] != wanted[field]:
                raise AdapterError(
                    f"{layer_name(path)}: the adapters have {field} {own[field]}, where "
                    f"{wanted[field]} is needed: adapt the model with their configuration; if the "
                    "scaling (alpha / rank) alone differs, convert them with adapters.rescale"
                )


def common_origins(trees: Sequence[Mapping[Path, Any]]) -> dict[Path, Origin]:
    """Returns the origins that adapter trees share, by path of the layer, as far as one is known.

    Raises:
      AdapterError: two are known to be of other settings; names layer and setting.
    """
    known: dict[Path, Origin] = {}
    for flat in trees:
        check_origin(flat, known)
        known |= {path[:-1]: own for path, x in flat.items() if (own := origin_of(x)) is not None}
    return known
