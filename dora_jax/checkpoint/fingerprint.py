"""The fingerprint of the frozen base that an adapter was trained on.

Each adapted layer keeps the norms and the first row of its frozen kernel (`FrozenBase`). Saved with
the adapter, they identify the base. The first row is a copy, so it must agree bit for bit. The norm
is a sum, whose last bits depend on the device and the sharding.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.placement import device_put_like, host_value
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import AdapterError, CheckpointError, Path, layer_name
from dora_jax.model import AdaptedModel, base_records
from dora_jax.processes import spans_processes

# Largest relative difference of two float32 norms summed in different orders. Measured on 28,672
# inputs: 2e-7 between XLA on one device and on four, 5e-6 for a running sum.
_NORM_TOLERANCE = 1e-5
_FIELDS = {field.name for field in dataclasses.fields(FrozenBase)}


def group_records(flat: Mapping[Path, Any]) -> dict[Path, FrozenBase]:
    """Returns the records of the base for arrays by module path and field.

    `{("up", "norm"): n, ("up", "first_row"): row}` gives `{("up",): FrozenBase(n, row)}`.

    Raises:
      CheckpointError: an array is unknown, missing, or of another shape; names the layer.
    """
    arrays: dict[Path, dict[str, Any]] = {}
    for path, value in flat.items():
        arrays.setdefault(path[:-1], {})[path[-1]] = value
    for path, own in arrays.items():
        known = {"norm", "first_row"} <= own.keys() <= _FIELDS
        if not known or np.shape(own["norm"]) != np.shape(own["first_row"]):
            raise CheckpointError(
                f"base of {layer_name(path)}: {sorted(own)} are not the arrays that are kept of a "
                "kernel: the folder is damaged"
            )
    return {path: FrozenBase(**own) for path, own in arrays.items()}


def check_same_base(
    saved: Mapping[Path, FrozenBase], model: AdaptedModel, *, allow_base_mismatch: bool
) -> dict[Path, FrozenBase]:
    """Returns the records that the layers of a model are to keep, see `reconcile`.

    Warns:
      UserWarning: the adapters were saved without records, so that nothing can be checked.
    """
    if not saved and base_records(model) and not allow_base_mismatch:
        warnings.warn(
            "the adapters were saved without the fingerprint of their base, so their base cannot "
            "be checked; pass allow_base_mismatch=True to load them without this warning",
            stacklevel=3,
        )
    return reconcile(saved, base_records(model), allow_base_mismatch=allow_base_mismatch)


def reconcile(
    saved: Mapping[Path, FrozenBase], own: Mapping[Path, FrozenBase], *, allow_base_mismatch: bool
) -> dict[Path, FrozenBase]:
    """Checks that adapters are loaded for their own base; returns the records to keep.

    For the same base these are the saved records, so that the model computes the same on every
    device, bit for bit. For another base the layers keep their own norm and first row.

    Args:
      saved: the records of the layers that are loaded, saved with the adapters.
      own: the records of all layers of the model.
      allow_base_mismatch: skips the check.

    Raises:
      AdapterError: a kernel differs; names the layer and the difference. With
        `allow_base_mismatch` too, if the layers are of another kind than the adapters'.
    """
    kept = {}
    for path, record in saved.items():
        if path not in own:
            raise AdapterError(f"{layer_name(path)} has an adapter in the folder alone")
        if problem := _other_kind(record, own[path]):
            raise AdapterError(
                f"{layer_name(path)}: {problem}; adapt the model with the configuration of the "
                "adapters"
            )
        kept[path] = record
        if problem := _difference(record, own[path]):
            if not allow_base_mismatch:
                raise AdapterError(
                    f"{layer_name(path)}: the adapter was trained for another base: {problem}. "
                    "Load that base, or pass allow_base_mismatch=True if it is meant for this one"
                )
            kept[path] = dataclasses.replace(own[path], init_a=record.init_a, init_b=record.init_b)
    return kept


def _other_kind(saved: FrozenBase, own: FrozenBase) -> str:
    """Returns how the records of two layers differ in kind; empty if they do not."""
    one, other = saved.arrays(), own.arrays()
    if one.keys() != other.keys():
        return f"the adapter keeps {sorted(one)} of its kernel, the model {sorted(other)}"
    for name in one:
        shape, own_shape = np.shape(one[name]), np.shape(other[name])
        if shape != own_shape:
            return f"the adapter's base has {name} of shape {shape}, the model's of {own_shape}"
    if saved.mask is not None and _number(_count_different, saved.mask, own.mask):
        return "the adapter has other layers_to_transform than the model"
    return ""


def _difference(saved: FrozenBase, own: FrozenBase) -> str:
    """Returns how two records of one kind differ; empty if they are of one kernel."""
    row, own_row, norm, own_norm = saved.first_row, own.first_row, saved.norm, own.norm
    if row.dtype != own_row.dtype:
        return f"its kernel is {row.dtype.name}, the model's {own_row.dtype.name}"
    features = _number(_count_different, row, own_row)
    if features or _number(_count_other_bits, row, own_row):
        return f"the first weight of {features} of {row.size} out features differs"
    if (far := _number(_count_far, norm, own_norm)) or _number(_count_not_finite, norm):
        return f"the norms of {far} of {norm.size} out features differ"
    return ""


def _number(count: Callable[..., Any], *arrays: Any) -> int:
    """Returns a count of two arrays; where no process holds them whole, the devices count."""
    if any(map(spans_processes, arrays)):
        like = next(filter(spans_processes, arrays))
        placed = (x if spans_processes(x) else device_put_like(x, like) for x in arrays)
        return int(jax.jit(count, static_argnums=0)(jnp, *placed))
    return int(count(np, *map(host_value, arrays)))


def _count_different(xp: Any, one: Any, other: Any) -> Any:
    return xp.sum(one != other)


def _count_other_bits(xp: Any, one: Any, other: Any) -> Any:
    bits = f"uint{8 * one.dtype.itemsize}"
    return xp.sum(one.view(bits) != other.view(bits))


def _count_far(xp: Any, one: Any, other: Any) -> Any:
    one, other = (x.astype(xp.promote_types(x.dtype, "float32")) for x in (one, other))
    return xp.sum(xp.abs(one - other) > _NORM_TOLERANCE * xp.maximum(one, other))


def _count_not_finite(xp: Any, x: Any) -> Any:
    return xp.sum(~xp.isfinite(x))
