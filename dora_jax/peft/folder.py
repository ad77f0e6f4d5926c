"""The two files of a PEFT adapter folder. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.disk import Folder, given_folder, read_in_one_piece, target_folder, written_whole
from dora_jax.disk.json_file import is_folder, read_text, shown
from dora_jax.errors import CheckpointError
from dora_jax.huggingface.safetensors import FLOATS, read_header, safetensors
from dora_jax.peft import config as config_file
from dora_jax.peft.config import PeftConfig, PeftError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

FILE = "adapter_model.safetensors"
_FILES = (FILE, config_file.FILE)

# The dtypes of adapters, by their names in safetensors.
_DTYPES = {name: FLOATS[name] for name in ("BF16", "F16", "F32", "F64")}

_DIGEST = "dora_jax_sha256"
# Fields that do not change what an adapter computes, so that they may be edited by hand.
_NOT_DIGESTED = ("base_model_name_or_path", "fan_in_fan_out", "inference_mode", "task_type")


def read(folder: Folder) -> tuple[PeftConfig, dict[str, Array]]:
    """Returns the configuration and the tensors, by key, of a PEFT adapter folder.

    Raises:
      PeftError: a file is missing, pickled, damaged, or holds a number that is not finite; names
        the file and the tensor.
    """
    path = given_folder(folder)
    return read_in_one_piece(path, lambda: _read(path))


def _read(path: pathlib.Path) -> tuple[PeftConfig, dict[str, Array]]:
    try:
        if not os.path.lexists(path / config_file.FILE):
            raise PeftError(_where_else(path))
        text = read_text(path / config_file.FILE)
    except CheckpointError as error:
        raise PeftError(str(error)) from error
    try:
        config = PeftConfig.from_json(text)
        tensors, metadata = _read_tensors(path)
    except PeftError as error:
        raise PeftError(f"{path}: {error}") from error
    if metadata.get(_DIGEST) not in (None, _digest(config, tensors)):
        raise PeftError(
            f"{path}: the digest in {FILE} is of other content, so one of the two files is damaged "
            "or of another adapter. Fetch them again. If you edited one on purpose, drop the "
            f"digest, {_DIGEST} in the metadata of {FILE}: load the tensors with "
            "safetensors.numpy.load_file and write them with safetensors.numpy.save_file"
        )
    return config, tensors


def write(folder: Folder, config: PeftConfig, tensors: Mapping[str, Array]) -> pathlib.Path:
    """Writes an adapter folder; returns its path.

    Raises:
      PeftError: a tensor is not finite, or of a dtype that adapters do not have.
      CheckpointError: the folder is the current one, or the disk is full.
    """
    path, target = pathlib.Path(folder), target_folder(folder)
    _check_finite(tensors)
    known = list(_DTYPES.values())
    if unknown := [key for key, x in tensors.items() if x.dtype not in known]:
        raise PeftError(
            f"{unknown[0]} is of {tensors[unknown[0]].dtype}; adapters are written in "
            f"{[dtype.name for dtype in known]}: pass dtype"
        )
    tensors = {key: x.copy(order="C") for key, x in tensors.items()}
    metadata = {"format": "pt", _DIGEST: _digest(config, tensors)}
    data = safetensors().numpy.save(tensors, metadata)
    with written_whole(target, own=_FILES.__contains__, overwrite=True) as new:
        (new / FILE).write_bytes(data)
        (new / config_file.FILE).write_text(config.to_json(), encoding="utf-8")
    return path


def _read_tensors(path: pathlib.Path) -> tuple[dict[str, Array], Mapping[str, str]]:
    """Returns the tensors of a folder by key, and the metadata of their file."""
    pickled = sorted(file.name for file in path.glob("*.bin"))
    if pickled and not os.path.lexists(path / FILE):
        raise PeftError(
            f"{pickled[0]} is a pickle, which can run any code when it is read, so it is refused. "
            "If you trust it, save the adapter again in PEFT: model.save_pretrained(FOLDER)"
        )
    safetensors()  # which may not be installed
    try:
        header = read_header(path / FILE)
    except CheckpointError as error:
        raise PeftError(f"{FILE} is {error}") from error
    if header.metadata.get("format") == "mlx":
        raise PeftError(
            f"{FILE} is a file of MLX, whose adapters have another layout: fuse it there "
            "(mlx_lm.fuse) and read the fused checkpoint"
        )
    for key, tensor in header.tensors.items():
        if tensor.dtype not in _DTYPES:
            raise PeftError(f"{key} in {FILE} is of {tensor.dtype}; only {list(_DTYPES)} are read")
    tensors = {key: tensor.read() for key, tensor in header.tensors.items()}
    _check_finite(tensors)
    return tensors, header.metadata


def _check_finite(tensors: Mapping[str, Array]) -> None:
    for key, x in tensors.items():
        if not np.isfinite(x).all():
            raise PeftError(f"{key} holds NaN or infinity: fetch it again, or train it anew")


def _digest(config: PeftConfig, tensors: Mapping[str, Array]) -> str:
    """Returns the sha256 of everything that decides what an adapter computes."""
    fields = dataclasses.asdict(config)
    for name in _NOT_DIGESTED:
        del fields[name]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for key in sorted(tensors):
        x = tensors[key]
        digest.update(f"{key} {x.dtype.name} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def _where_else(path: pathlib.Path) -> str:
    """Returns an error message for a folder without an adapter."""
    if not is_folder(path):
        return f"{shown(path)} is not a folder: give the one that holds {config_file.FILE}"
    inside = sorted(str(file.parent) for file in path.glob(f"*/{config_file.FILE}"))
    found = f"give one of the folders inside that hold adapters: {inside}" if inside else "fetch it"
    return f"{path} has no {config_file.FILE}; {found}"
