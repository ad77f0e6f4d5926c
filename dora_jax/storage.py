"""Trees of arrays on disk, through Orbax, with a manifest that tells damage from data.

A folder holds two Orbax items: `arrays`, a tree of nested dicts, and `metadata`, a JSON object with
the shape, dtype and SHA-256 of every array, and a SHA-256 of itself. Nothing is pickled.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # type: ignore[import-untyped]
from jax.experimental import multihost_utils

from dora_jax.config import AdapterError, DoRAError, Path

if TYPE_CHECKING:
    from os import PathLike

FORMAT = "dora_jax/1"
_MEMBERS = ("format", "arrays", "metadata")


class CheckpointError(DoRAError):
    """A checkpoint is damaged, incomplete or of another format; the message names file or array."""


def save_args(tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> ocp.args.Composite:
    """Returns the Orbax arguments that write a tree of arrays with its manifest.

    Args:
      tree: nested dicts of arrays; typed random keys are allowed.
      metadata: JSON types and `bytes`.

    Raises:
      AdapterError: a name holds a slash, or metadata is no JSON; names it.
    """
    arrays, manifest = {}, {}
    for path, leaf in flatten_tree(tree).items():
        entry, value = _describe(leaf)
        manifest["/".join(path)] = entry
        arrays[path] = value
    content = {"format": FORMAT, "arrays": manifest, "metadata": encode_json(metadata)}
    return ocp.args.Composite(
        arrays=ocp.args.PyTreeSave(nest(arrays)),
        metadata=ocp.args.JsonSave({**content, "sha256": _digest(_canonical(content))}),
    )


def write(
    folder: str | PathLike[str],
    tree: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes a tree into a new folder, which appears only when it is complete.

    With `overwrite`, a folder that is there is exchanged after the new one has been written.
    """
    path = absolute(folder)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: pass overwrite=True, or choose another folder")
    if path.exists() and not (path / "metadata").is_dir() and any(path.iterdir()):
        raise CheckpointError(f"{path} holds something else: choose another folder")
    args = save_args(tree, metadata)
    target = path.parent / f".{path.name}.new" if path.exists() else path
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(target, args=args, force=True)
    if target != path and jax.process_index() == 0:
        old = path.parent / f".{path.name}.old"
        if old.exists():
            old.rmtree()
        path.rename(old)
        target.rename(path)
        old.rmtree()


def read_metadata(folder: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the manifest of the arrays, by slashed path, and the metadata of a folder.

    Raises:
      CheckpointError: the folder is none that `write` wrote, or its manifest is damaged.
    """
    path = absolute(folder)
    file = path / "metadata" / "metadata"
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    if not file.exists():
        raise CheckpointError(
            f"{path} is no checkpoint of dora_jax, or an incomplete one: {file} is missing"
        )
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{file} is not a manifest of dora_jax")
    digest = content.pop("sha256", None)
    if digest != _digest(_canonical(content)):
        raise CheckpointError(f"{file} is damaged: it does not match its own sha256")
    if content["format"] != FORMAT or tuple(content) != _MEMBERS:
        raise CheckpointError(
            f"{file} is of format {content['format']!r}, this version reads {FORMAT!r}: "
            "use the dora_jax that wrote it, or a newer one"
        )
    return content["arrays"], decode_json(content["metadata"])


def read(
    folder: str | PathLike[str], wanted: Callable[[Path], bool] = lambda path: True
) -> dict[Path, Any]:
    """Returns the arrays of a folder by path, as NumPy arrays, each checked.

    Args:
      folder: what `write` wrote, or one step of a `CheckpointManager` with `save_args`.
      wanted: which arrays to read, by path.

    Raises:
      CheckpointError: something is missing or damaged; names the file or array.
    """
    path = absolute(folder)
    manifest, _ = read_metadata(path)
    entries = {tuple(name.split("/")): entry for name, entry in manifest.items()}
    entries = {name: entry for name, entry in entries.items() if wanted(name)}
    if not entries:
        return {}
    try:
        restored = flatten_tree(_restore(path / "arrays", nest(dict.fromkeys(entries, 0))))
    except Exception as error:  # whatever Orbax and TensorStore make of damaged files
        raise CheckpointError(
            f"{path / 'arrays'} is damaged or incomplete: {_first_line(error)}"
        ) from error
    return {name: _checked(path, name, restored.get(name), e) for name, e in entries.items()}


def place(value: Any, like: Any) -> Any:
    """Returns an array on the devices, and in the sharding, of another of the same shape.

    Each process puts the shards of its own devices there.
    """
    if not isinstance(like, jax.Array):
        return value if isinstance(like, np.ndarray | np.generic) else jnp.asarray(value)
    if not like.committed:
        return jnp.asarray(value)
    if _is_key(like):
        return jax.device_put(value, like.sharding)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])


def flatten_tree(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """Returns the leaves of any pytree by path, of strings; `is_leaf` as for `jax.tree.leaves`.

    Raises:
      AdapterError: a name holds a slash, or two paths are the same.

    Example:
      >>> flatten_tree({"layers": [1, 2]})
      {('layers', '0'): 1, ('layers', '1'): 2}
    """
    flat: dict[Path, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if any("/" in part for part in path) or path in flat:
            raise AdapterError(f"{path}: names must be distinct and hold no slash")
        flat[path] = leaf
    return flat


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns nested dicts from leaves by path.

    Example:
      >>> nest({("layers", "0"): 1})
      {'layers': {'0': 1}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def absolute(folder: str | PathLike[str]) -> epath.Path:
    """Returns the absolute path, as Orbax wants it; `~` is the home folder."""
    return epath.Path(folder).expanduser().absolute()


def encode_json(value: Any, name: str = "metadata") -> Any:
    """Returns a value as JSON types, with bytes as `{"bytes": base64}`; raises what would change.

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
        f"{name} holds a {type(value).__name__}, which JSON cannot keep: use dicts with strings as "
        "keys, lists, numbers, strings and bytes; arrays belong into the state"
    )


def decode_json(value: Any) -> Any:
    """Returns what `encode_json` was given, tuples as lists."""
    if isinstance(value, list):
        return [decode_json(v) for v in value]
    if isinstance(value, dict):
        if list(value) == ["bytes"] and isinstance(value["bytes"], str):
            return base64.b64decode(value["bytes"])
        return {k: decode_json(v) for k, v in value.items()}
    return value


def host_value(x: Any) -> np.ndarray:
    """Returns the whole array on the host, from all processes; of a random key, its data."""
    if _is_key(x):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _describe(leaf: Any) -> tuple[dict[str, Any], Any]:
    """Returns the manifest's entry of an array, and the array as it is written."""
    value = host_value(leaf)
    entry = {
        "shape": list(value.shape),
        "dtype": value.dtype.name,
        "sha256": _digest(_bytes(value)),
    }
    if _is_key(leaf):
        return {**entry, "key": str(jax.random.key_impl(leaf))}, jax.random.key_data(leaf)
    return entry, leaf if isinstance(leaf, jax.Array) else value


def _checked(folder: epath.Path, path: Path, value: Any, entry: Mapping[str, Any]) -> Any:
    """Returns an array as it was before it was written, or raises that it is damaged."""
    name = "/".join(path)
    if not isinstance(value, np.ndarray):
        raise CheckpointError(f"{folder}: array {name} is missing")
    given = [list(value.shape), value.dtype.name]
    if given != [entry["shape"], entry["dtype"]]:
        raise CheckpointError(
            f"{folder}: array {name} is {given[1]} {tuple(given[0])}, the manifest says "
            f"{entry['dtype']} {tuple(entry['shape'])}"
        )
    if _digest(_bytes(value)) != entry["sha256"]:
        raise CheckpointError(f"{folder}: array {name} is damaged: it does not match its sha256")
    if "key" in entry:
        return jax.random.wrap_key_data(jnp.asarray(value), impl=entry["key"])
    return value


def _restore(folder: epath.Path, item: dict[str, Any]) -> Any:
    """Reads the arrays of a tree of placeholders to the host, wherever they were saved from."""
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    return ocp.PyTreeCheckpointHandler().restore(
        folder,
        args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True),
    )


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _bytes(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def _canonical(content: Any) -> bytes:
    return json.dumps(content).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
