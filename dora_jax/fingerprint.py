"""By what an adapter recognises the base it was trained for.

Of every frozen kernel a layer keeps its norms and its row at index 0 (`describe_base`). Saved with
the adapter, they tell the base: the row is a copy, so it must agree bit for bit; the norm is a sum,
whose last bits depend on the device and the sharding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from dora_jax.config import AdapterError, Path, layer_name
from dora_jax.linen import DoRAModel
from dora_jax.nnx import BaseParam
from dora_jax.state_arrays import nnx_values, set_nnx_values
from dora_jax.storage import host_value, place

M = TypeVar("M")
Bases = Mapping[Path, Mapping[str, Any]]

# Of two float32 norms, summed in different orders. Measured on 28,672 inputs: 2e-7 between XLA on
# one device and on four, 5e-6 for a running sum.
_NORM_TOLERANCE = 1e-5
_FACTORS = ("start_a", "start_b")  # of what layers act by that do not start at a product of zero
_PREFIX = "base_"


def bases_of(model: Any) -> dict[Path, dict[str, Any]]:
    """Returns what each adapted layer of an NNX model or a `DoRAModel` keeps of its base."""
    if isinstance(model, DoRAModel):
        return {path: dict(base) for path, base in model.base.items()}
    values = nnx_values(model, BaseParam)
    return group_bases({(*p[:-1], p[-1].removeprefix(_PREFIX)): x for p, x in values.items()})


def group_bases(flat: Mapping[Path, Any]) -> dict[Path, dict[str, Any]]:
    """Returns arrays by path and name, grouped by path."""
    bases: dict[Path, dict[str, Any]] = {}
    for path, value in flat.items():
        bases.setdefault(path[:-1], {})[path[-1]] = value
    return bases


def with_bases(model: M, bases: Bases) -> M:
    """Puts what `bases_of` returned back; an NNX model is changed in place."""
    if isinstance(model, DoRAModel):
        placed = {
            path: {name: place(base[name], like) for name, like in model.base[path].items()}
            for path, base in bases.items()
        }
        return dataclasses.replace(model, base={**model.base, **placed})
    values = {
        (*path, _PREFIX + name): value
        for path, base in bases.items()
        for name, value in base.items()
    }
    set_nnx_values(model, BaseParam, values)
    return model


def reconcile(saved: Bases, own: Bases, *, other_base: bool) -> dict[Path, dict[str, Any]]:
    """Checks that adapters are loaded for their own base; returns what the layers are to keep.

    That is what was saved, so that the adapted model computes the same bit for bit wherever it is
    loaded. For another base it is what is known of that one.

    Args:
      saved: of the layers that are loaded, as the adapters were saved with it.
      own: of all layers of the model.
      other_base: skips the check.

    Raises:
      AdapterError: a kernel is another one; names the layer and what differs. With `other_base`
        too, if the layers would compute something else than the adapters' do.
    """
    kept = {}
    for path, base in saved.items():
        if problem := _other_kind(base, own[path]):
            raise AdapterError(
                f"{layer_name(path)}: {problem}; adapt the model with the configuration of the "
                "adapters"
            )
        if problem := _difference(base, own[path]):
            if not other_base:
                raise AdapterError(
                    f"{layer_name(path)}: the adapter was trained for another base: {problem}. "
                    "Load that base, or pass other_base=True if it is meant for this one"
                )
            kept[path] = {**own[path], **{n: base[n] for n in _FACTORS if n in base}}
        else:
            kept[path] = dict(base)
    return kept


def _other_kind(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Returns in what two layers act in another way; empty if in nothing."""
    if saved.keys() != own.keys():
        return f"the adapter keeps {sorted(saved)} of its kernel, the model {sorted(own)}"
    for name in saved:
        one, other = np.shape(saved[name]), np.shape(own[name])
        if one != other:
            return f"the adapter's base has {name} of shape {one}, the model's of {other}"
    if "mask" in saved and (host_value(saved["mask"]) != host_value(own["mask"])).any():
        return "the adapter has other layers_to_transform than the model"
    return ""


def _difference(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Returns in what the description of a kernel is not that of another; empty if in nothing."""
    one, other = ({k: host_value(x[k]) for k in ("row", "norm")} for x in (saved, own))
    row, own_row = one["row"], other["row"]
    if row.dtype != own_row.dtype:
        return f"its kernel is {row.dtype.name}, the model's {own_row.dtype.name}"
    if (features := int(np.sum(row != own_row))) or row.tobytes() != own_row.tobytes():
        return f"the first weight of {features} of {row.size} out features differs"
    norm, own_norm = (np.asarray(x["norm"], np.float64) for x in (one, other))
    far = np.abs(norm - own_norm) > _NORM_TOLERANCE * np.maximum(norm, own_norm)
    if far.any() or not np.isfinite(norm).all():
        return f"the norms of {int(far.sum())} of {norm.size} out features differ"
    return ""
