"""Trees of arrays on disk, through Orbax, with a manifest of checksums that shows damage.

A folder holds two Orbax items: `arrays`, a tree of nested dicts, and `metadata`, a JSON object with
the shape, dtype and SHA-256 of every array, and a SHA-256 of itself. Nothing is pickled.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # type: ignore[import-untyped]

from dora_jax.adapters.placement import host_value, is_random_key
from dora_jax.adapters.trees import flatten, nest
from dora_jax.checkpoint.checksums import checksums, matches, saved_in_parts_of
from dora_jax.checkpoint.manifest import (
    FORMAT,
    canonical_json,
    check_files,
    digest,
    is_remote,
    path_of,
    read_manifest,
    slashed,
)
from dora_jax.disk import (
    given_folder,
    ignore_late_threads,
    said_once,
    target_folder,
    written_by_all,
    written_whole,
)
from dora_jax.disk.json_file import is_folder, reason, shown
from dora_jax.errors import AdapterError, CheckpointError, Path
from dora_jax.processes import several, spans_processes

if TYPE_CHECKING:
    from os import PathLike


def save_args(tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> ocp.args.Composite:
    """Returns the Orbax arguments that write a tree of arrays with its manifest.

    Args:
      tree: nested dicts of arrays; typed random keys are allowed.
      metadata: JSON types and `bytes`.

    Raises:
      AdapterError: metadata is no JSON; names it.
    """
    flat = {slashed(path): leaf for path, leaf in flatten(tree).items()}
    written = {name: _as_written(leaf) for name, leaf in flat.items()}
    manifest = {
        name: {"shape": list(written[name].shape), "dtype": written[name].dtype.name, **checksum}
        for name, checksum in checksums(written).items()
    }
    for name, leaf in flat.items():
        if is_random_key(leaf):
            manifest[name]["key"] = str(jax.random.key_impl(leaf))
    arrays = {tuple(name.split("/")): value for name, value in written.items()}
    content = {"format": FORMAT, "arrays": manifest, "metadata": encode_json(metadata)}
    return ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(nest(arrays)),
        metadata=ocp.args.JsonSave({**content, "sha256": digest(canonical_json(content))}),
    )


def write(
    folder: str | PathLike[str],
    tree: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a tree into a folder, which is complete at any moment, or not there.

    With `overwrite`, the new version takes the place of an old one in one step.

    Raises:
      AdapterError: see `save_args`.
      CheckpointError: the folder exists, or holds other files; or the disk is full.
    """
    args = save_args(tree, metadata)
    begin = functools.partial(_new_version, folder, overwrite=overwrite)
    with (
        written_by_all(begin) as new,
        said_once(),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(new, args=args, force=True)


def _new_version(
    folder: str | PathLike[str], *, overwrite: bool
) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Returns a block that makes a folder, or the new version of one; errors as for `write`."""
    path = target_folder(folder)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: pass overwrite=True, or choose another folder")
    if path.exists() and not (path / "metadata").is_dir() and any(path.iterdir()):
        raise CheckpointError(f"{path} holds other files: choose another folder")
    return written_whole(path, own=lambda _: True, overwrite=overwrite)


def read_metadata(folder: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the manifest of the arrays, by slashed path, and the metadata of a folder.

    Raises:
      CheckpointError: the folder was not written by `write`, or its manifest is damaged.
    """
    path = absolute(folder)
    file = path / "metadata" / "metadata"
    if not (path.is_dir() if is_remote(path) else is_folder(path)):
        raise CheckpointError(f"{shown(path)} is no folder: check the path")
    if not (file.exists() if is_remote(path) else os.path.lexists(file)):
        raise CheckpointError(
            f"{path} is not a checkpoint of dora_jax, or it is incomplete: {file} is missing"
        )
    content = read_manifest(file)
    try:
        metadata = decode_json(content["metadata"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: metadata: {reason(error)}") from error
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file} is damaged: metadata must be an object")
    return content["arrays"], metadata


def read(
    folder: str | PathLike[str],
    wanted: Callable[[Path], bool] = lambda path: True,
    likes: Mapping[Path, Any] | None = None,
) -> dict[Path, Any]:
    """Returns the arrays of a folder by path, as NumPy arrays, each checked by its checksum.

    Args:
      folder: written by `write`, or one step of a `CheckpointManager` with `save_args`.
      wanted: which arrays to read, by path.
      likes: arrays in whose place they are to be. Where such an array spans processes, and was
        saved in the same parts, each process reads and checks its own, and the result is an array
        in that sharding.

    Raises:
      CheckpointError: a file or an array is missing or damaged; names it.
    """
    path = absolute(folder)
    manifest, _ = read_metadata(path)
    entries = {name: entry for name, entry in manifest.items() if wanted(path_of(name))}
    if not entries:
        return {}
    check_files(path / "arrays")
    placed = {name: (likes or {}).get(path_of(name)) for name in entries}
    arguments = {
        tuple(name.split("/")): _restore_args(entry, placed[name])
        for name, entry in entries.items()
    }
    undo = ignore_late_threads()
    try:
        restored = flatten(_restore(path / "arrays", nest(arguments)))
    except Exception as error:  # of any class: Orbax and TensorStore raise many for damaged files
        raise CheckpointError(
            f"{path / 'arrays'} is damaged or incomplete: {_first_line(error)}"
        ) from error
    undo()
    return {
        path_of(name): _checked(path, name, restored.get(tuple(name.split("/"))), entry)
        for name, entry in entries.items()
    }


def absolute(folder: str | PathLike[str]) -> epath.Path:
    """Returns the absolute path, as Orbax needs it; `~` is the home folder.

    Raises:
      CheckpointError: the path is an empty string.
    """
    return epath.Path(given_folder(folder))


def encode_json(value: Any, name: str = "metadata") -> Any:
    """Returns a value as JSON types, with bytes as `{"bytes": base64}`.

    Raises:
      AdapterError: a value would not come back as it is, apart from tuples; names it.

    Example:
      >>> decode_json(encode_json({"position": b"12"}))
      {'position': b'12'}
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [encode_json(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: encode_json(v, f"{name}[{k!r}]") for k, v in value.items()}
    raise AdapterError(
        f"{name} holds a {type(value).__name__}, which JSON cannot hold: use dicts with strings as "
        "keys, lists, numbers, strings and bytes; pass arrays in the state"
    )


def decode_json(value: Any) -> Any:
    """Returns the value that `encode_json` was given, with lists in place of tuples."""
    if isinstance(value, list):
        return [decode_json(v) for v in value]
    if isinstance(value, dict):
        if list(value) == ["bytes"] and isinstance(value["bytes"], str):
            return base64.b64decode(value["bytes"])
        return {k: decode_json(v) for k, v in value.items()}
    return value


def _as_written(leaf: Any) -> Any:
    """Returns an array in the form that is written: key data, and of this host what it has alone.

    Orbax writes what each process has to itself from the first one, if it is on the host.
    """
    if is_random_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array) or (several() and not spans_processes(leaf)):
        return host_value(leaf)
    return leaf


def _checked(folder: epath.Path, name: str, value: Any, entry: Mapping[str, Any]) -> Any:
    """Returns an array as it was before it was written; raises `CheckpointError` if damaged."""
    if not isinstance(value, np.ndarray | jax.Array):
        raise CheckpointError(f"{folder}: array {name} is missing")
    given = [list(value.shape), value.dtype.name]
    if given != [entry["shape"], entry["dtype"]]:
        raise CheckpointError(
            f"{folder}: array {name} is {given[1]} {tuple(given[0])}, the manifest says "
            f"{entry['dtype']} {tuple(entry['shape'])}"
        )
    if not matches(value, entry):
        raise CheckpointError(f"{folder}: array {name} is damaged: it does not match its sha256")
    if "key" in entry:
        try:
            return jax.random.wrap_key_data(jnp.asarray(value), impl=entry["key"])
        except (ValueError, TypeError) as error:  # another kind of key, or of another shape
            raise CheckpointError(f"{folder}: array {name}: {reason(error)}") from error
    return value


def _restore_args(entry: Mapping[str, Any], like: Any) -> ocp.RestoreArgs:
    """Returns how Orbax reads an array: into the sharding of another one, or to the host."""
    if spans_processes(like) and saved_in_parts_of(like, entry):
        return ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _restore(folder: epath.Path, arguments: dict[str, Any]) -> Any:
    """Reads the arrays of a tree of Orbax's arguments, whatever devices they were on."""
    is_leaf = lambda x: isinstance(x, ocp.RestoreArgs)  # noqa: E731
    item = jax.tree.map(lambda _: 0, arguments, is_leaf=is_leaf)
    return ocp.PyTreeCheckpointHandler().restore(
        folder,
        args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason(error)}"
