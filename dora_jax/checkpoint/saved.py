"""The content of a folder of adapters, read without a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dora_jax.adapters.origin import origin, remember
from dora_jax.adapters.trees import nest
from dora_jax.checkpoint.checks import check_ranks, read_axes
from dora_jax.checkpoint.fingerprint import group_records
from dora_jax.checkpoint.storage import absolute, read, read_metadata
from dora_jax.config import DoRAConfig, TrainedConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.disk import read_in_one_piece
from dora_jax.disk.json_file import is_folder
from dora_jax.errors import CheckpointError, DoRAError, Path
from dora_jax.selection import is_in_saved_module

if TYPE_CHECKING:
    from os import PathLike

    from etils import epath  # type: ignore[import-untyped]

    Folder = str | PathLike[str]


@dataclasses.dataclass(frozen=True)
class SavedAdapters:
    """The content of a folder of adapters.

    Attributes:
      adapters: the adapter tree, of NumPy arrays; of JAX arrays where each process read its parts.
      config: the configuration they were trained with.
      statistics: batch statistics of the model, as running means, in nested dicts; empty if it has
        none, or the adapters were saved without it. A Linen model applies with them.
      base: the record of each layer's frozen kernel, by module path; empty if the adapters were
        saved without their model.
      axes: of those kernels, by module path; empty in the same case.
      version: of the dora_jax that wrote the folder.
    """

    adapters: dict[str, Any]
    statistics: dict[str, Any]
    config: DoRAConfig
    base: Mapping[Path, FrozenBase]
    axes: Mapping[Path, KernelAxes]
    version: str


def read_adapters(path: Folder, likes: Mapping[Path, Any] | None = None) -> SavedAdapters:
    """Reads a folder of adapters without a model.

    Args:
      path: the folder.
      likes: adapter arrays in whose place they are to be, by path. Where one spans processes, each
        process reads its own parts, see `storage.read`.

    Raises:
      CheckpointError: the folder is damaged or incomplete; names the file or array.
    """
    folder = _folder_of(path)
    return read_in_one_piece(folder, lambda: _read(folder, likes or {}))


def read_config(path: Folder) -> DoRAConfig:
    """Reads the configuration of a folder of adapters, and none of its arrays; errors likewise."""
    folder = _folder_of(path)
    return read_in_one_piece(folder, lambda: _config(folder, read_metadata(folder)[1]))


def _folder_of(path: Folder) -> epath.Path:
    """Returns the folder; raises `CheckpointError` if it is one of several checkpoints."""
    folder = absolute(path)
    if is_folder(folder) and not (folder / "metadata").exists():
        steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
        if steps:
            raise CheckpointError(
                f"{folder} holds checkpoints of a training run: name one, such as "
                f"{folder / str(steps[-1])}"
            )
    return folder


def _config(folder: PathLike[str], metadata: Mapping[str, Any]) -> DoRAConfig:
    if "config" not in metadata:
        raise CheckpointError(f"{folder} holds no configuration of adapters")
    try:
        return TrainedConfig.of(DoRAConfig.from_json(json.dumps(metadata["config"])))
    except DoRAError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _read(folder: PathLike[str], likes: Mapping[Path, Any]) -> SavedAdapters:
    _, metadata = read_metadata(folder)
    config = _config(folder, metadata)
    try:
        axes, version = read_axes(metadata.get("axes")), metadata.get("version")
    except DoRAError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not isinstance(version, str):
        raise CheckpointError(f"{folder}: version is {version!r}: it is damaged")
    placed = {("adapters", *path): like for path, like in likes.items()}
    arrays = read(folder, lambda path: path[0] in ("adapters", "statistics", "base"), placed)
    base, flat, statistics = (
        {p[1:]: x for p, x in arrays.items() if p[0] == part}
        for part in ("base", "adapters", "statistics")
    )
    try:
        check_ranks(config, flat, axes)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    layers = {path[:-1] for path in flat if not is_in_saved_module(config, path)}
    changes = config.changes_product
    origins = {p: origin(config.layer_settings(p), changes_product=changes) for p in layers}
    remember(flat, origins)
    return SavedAdapters(nest(flat), nest(statistics), config, group_records(base), axes, version)
