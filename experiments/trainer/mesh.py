"""The devices of a run as a named mesh: `data`, `fsdp` and `tensor`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
"""Copies of the model; rows over which its arrays are cut; columns of one product."""


class MeshError(ValueError):
    """A mesh is misspelt, or does not fit the devices."""


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the size of each axis; axes that are left out have size 1.

    Args:
        text: Sizes by name, such as `"fsdp=8,tensor=2"`. The empty text is one device.

    Raises:
        MeshError: A name is not one of `AXES` or occurs twice, or a size is not a positive number.

    Example:
        >>> parse_mesh("fsdp=8,tensor=2")
        {'data': 1, 'fsdp': 8, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise MeshError(
                f"mesh {text!r}: cannot read {part!r}. Write each of {', '.join(AXES)} at most "
                "once, with a number of devices, as in fsdp=8,tensor=2."
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """Returns a mesh with the axes of `AXES`.

    Args:
        sizes: From `parse_mesh`.
        devices: As many as the mesh has. The default is the first ones of `jax.devices()`.
        axis_type: How XLA or JAX decides on the sharding of what is computed.

    Raises:
        MeshError: There are fewer devices than the mesh has.
    """
    shape = tuple(sizes[name] for name in AXES)
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) > len(devices):
        raise MeshError(
            f"the mesh {dict(sizes)} has {math.prod(shape)} devices, and there are {len(devices)}"
        )
    chosen = list(devices)[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(axis_type,) * len(AXES), devices=chosen)
