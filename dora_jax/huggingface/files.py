"""The tensors of a Hugging Face checkpoint folder: safetensors, in one file or in several.

A folder holds `model.safetensors`; or `model-00001-of-00003.safetensors` and so on, with an index
of the file that each tensor is in. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.disk.json_file import is_folder, read_json, shown
from dora_jax.errors import CheckpointError, MissingFileError
from dora_jax.huggingface.safetensors import Header, StoredTensor, read_header, safetensors
from dora_jax.processes import failing_together, is_first

if TYPE_CHECKING:
    from jaxtyping import Shaped


FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_INDEX = 32_000_000
_MLX = "a quantised file of MLX: convert it there first (mlx_lm.convert --dequantize)."
WEIGHTS = (FILE, "model-*-of-*.safetensors", INDEX)
"""The names of files with weights, as patterns."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """The headers of a checkpoint folder's files.

    Attributes:
      weights: the file that holds the tensors, or the index.
      tensors: by name.
      unreadable: names of tensors in files that cannot be read.
      problems: a line for every problem.
    """

    weights: pathlib.Path
    tensors: dict[str, StoredTensor]
    unreadable: set[str]
    problems: list[str]


def open_folder(path: pathlib.Path) -> Folder:
    """Reads the headers of a checkpoint folder's files.

    Raises:
      MissingFileError: there is no folder, or no weights in it.
      CheckpointError: the weights are pickled; or the only file, or the index, cannot be read.
    """
    files = _files(path)
    if isinstance(files, str):
        try:
            header = read_header(path / files)
        except CheckpointError as error:
            raise CheckpointError(f"{path / files} is {error}") from error
        if _is_quantised_mlx(header):
            raise CheckpointError(f"{path / files} is {_MLX}")
        return Folder(path / files, header.tensors, set(), [])
    tensors: dict[str, StoredTensor] = {}
    unreadable: set[str] = set()
    problems: list[str] = []
    for file, listed in sorted(files.items()):
        try:
            header = read_header(path / file)
            if _is_quantised_mlx(header):
                raise CheckpointError(_MLX)
            found = header.tensors
        except CheckpointError as error:
            problems.append(f"{file}: {error} It has {len(listed)} of the tensors.")
            unreadable |= listed
            continue
        absent = listed - found.keys()
        problems += [f"{name}: not in {file}, where {INDEX} has it." for name in sorted(absent)]
        problems += [
            f"{name}: in {tensors[name].file.name} and in {file}. Delete one of them."
            for name in sorted(found.keys() & tensors.keys())
        ]
        unreadable |= absent
        tensors |= found
    return Folder(path / INDEX, tensors, unreadable, problems)


def _is_quantised_mlx(header: Header) -> bool:
    is_mlx = header.metadata.get("format") == "mlx"
    return is_mlx and any(tensor.dtype == "U32" for tensor in header.tensors.values())


def save_tensors(
    folder: pathlib.Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Callable[[], Shaped[np.ndarray, "..."]]],
    max_file_bytes: int,
) -> None:
    """Writes tensors into an empty folder, with an index if they take several files.

    Args:
      folder: where to write.
      sizes: the number of bytes of each tensor, by name.
      make: gathers a tensor by name in all processes, and returns a function that makes it in the
        first. That one alone writes, and holds the tensors of one file at once.
      max_file_bytes: the largest size of a file, unless a single tensor is larger.
    """
    files = _distribute(sizes, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Any] = {}
        for name in names:
            made = make(name)
            with failing_together():
                if is_first():
                    tensors[name] = _contiguous(made())
        weight_map |= dict.fromkeys(names, file)
        with failing_together():
            if is_first():
                safetensors().numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
                # save_file lets only the file's owner read it.
                (folder / file).chmod(folder.stat().st_mode & 0o666)
        del tensors  # before the next file's are made
    if len(files) > 1 and is_first():
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def assign(target: Shaped[np.ndarray, "..."], source: Shaped[np.ndarray, "..."]) -> None:
    """Casts one array into another of its shape, in blocks.

    In one piece, a transposed matrix takes six times as long (2048 x 5632 of bfloat16: 70 ms
    against 13): every element is in another cache line than the one before.
    """
    for start in range(0, source.shape[-1] if source.ndim else 1, 256):
        block = (..., slice(start, start + 256)) if source.ndim else ...
        target[block] = source[block]


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a folder that hold weights, and their index."""
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))


def _files(folder: pathlib.Path) -> str | dict[str, set[str]]:
    """Returns the folder's only file; or the names of the tensors in each of several files."""
    if not is_folder(folder):
        raise MissingFileError(
            f"{shown(folder)} is not a folder: give a Hugging Face checkpoint folder."
        )
    if os.path.lexists(folder / FILE):
        return FILE
    if os.path.lexists(folder / INDEX):
        return _read_index(folder / INDEX)
    save_again = (
        "save it again where transformers is installed: "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds {pickled[0]} but no {FILE}. A .bin file is a pickle, which can run "
            f"any code when it is read, so it is refused. If you trust it, {save_again}"
        )
    raise MissingFileError(f"{folder / FILE} is missing: fetch it, or {save_again}")


def _read_index(path: pathlib.Path) -> dict[str, set[str]]:
    """Returns the names of the tensors in each file of an index."""
    damaged = f"{path} is damaged: it must be a JSON object with a weight_map from tensors to files"
    try:
        index = read_json(path, largest=_LARGEST_INDEX)
    except CheckpointError as error:
        raise CheckpointError(f"{damaged} ({error}). Fetch it again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    entries = list(weight_map.items()) if isinstance(weight_map, dict) else []
    files: dict[str, set[str]] = {}
    for name, file in entries:
        # Hugging Face writes no path that leads out of the folder.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or len(file) > 255:
            raise CheckpointError(f"{damaged}; it has {name} in {file!r:.300}. Fetch it again.")
        files.setdefault(file, set()).add(name)
    if not files:
        raise CheckpointError(f"{damaged}; it is empty. Fetch it again.")
    return files


def _contiguous(x: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    if x.flags.c_contiguous:
        return x
    copy = np.empty(x.shape, x.dtype)
    assign(copy, x)
    return copy


def _distribute(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Divides names into lists of at most `limit` bytes, in their order.

    Example:
      >>> _distribute({"a": 2, "b": 3, "c": 9, "d": 1}, 5)
      [['a', 'b'], ['c'], ['d']]
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
