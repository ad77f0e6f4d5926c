"""The two files of a PEFT adapter folder. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dora_jax.peft import config as config_file
from dora_jax.peft.config import PeftConfig, PeftError

if TYPE_CHECKING:
    Folder = str | os.PathLike[str]
    Array = np.ndarray[Any, Any]

FILE = "adapter_model.safetensors"

# What safetensors calls the dtypes that adapters come in.
_DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}

_DIGEST = "dora_jax_sha256"
# Fields that do not change what an adapter computes, so that they may be edited by hand.
_NOT_DIGESTED = ("base_model_name_or_path", "fan_in_fan_out", "inference_mode", "task_type")


def adapter_folder(folder: Folder, adapter_name: str) -> pathlib.Path:
    """Returns where PEFT keeps an adapter: the one named "default" in the folder itself."""
    folder = pathlib.Path(folder)
    return folder if adapter_name == "default" else folder / adapter_name


def read(
    folder: Folder, adapter_name: str = "default", *, verify: bool = True
) -> tuple[PeftConfig, dict[str, Array]]:
    """Returns the configuration and the tensors, by key, of a PEFT adapter folder.

    Args:
      folder: as written by PEFT's `save_pretrained`, or by this package's.
      adapter_name: of the adapter, if it is not the default one.
      verify: whether the digest that this package writes has to fit (PEFT writes none).

    Raises:
      PeftError: a file is missing, pickled, damaged, or holds a number that is not finite; names
        the file and the tensor.
    """
    path = adapter_folder(folder, adapter_name)
    try:
        text = (path / config_file.FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PeftError(_where_else(pathlib.Path(folder), path)) from error
    except (UnicodeDecodeError, OSError) as error:
        raise PeftError(f"{path / config_file.FILE} cannot be read: {error}") from error
    try:
        config = PeftConfig.from_json(text)
        tensors, metadata = _read_tensors(path)
    except PeftError as error:
        raise PeftError(f"{path}: {error}") from error
    if verify and metadata.get(_DIGEST) not in (None, _digest(config, tensors)):
        raise PeftError(
            f"{path}: the digest in {FILE} does not fit, so one of the two files is damaged, or of "
            "another adapter. Fetch them again; if you edited one on purpose, pass verify=False"
        )
    return config, tensors


def write(
    folder: Folder, adapter_name: str, config: PeftConfig, tensors: Mapping[str, Array]
) -> pathlib.Path:
    """Writes an adapter folder; returns the folder that holds its files.

    Raises:
      PeftError: a tensor is not finite, or of a dtype that adapters do not come in.
    """
    path = adapter_folder(folder, adapter_name)
    _check_finite(tensors)
    known = [np.dtype(dtype) for dtype in _DTYPES.values()]
    if unknown := [key for key, x in tensors.items() if x.dtype not in known]:
        raise PeftError(
            f"{unknown[0]} is of {tensors[unknown[0]].dtype}; adapters are written in "
            f"{[dtype.name for dtype in known]}: pass dtype"
        )
    _safetensors()
    from safetensors.numpy import save

    tensors = {key: x.copy(order="C") for key, x in tensors.items()}
    data = save(tensors, {"format": "pt", _DIGEST: _digest(config, tensors)})
    path.mkdir(parents=True, exist_ok=True)
    for name, content in ((FILE, data), (config_file.FILE, config.to_json().encode())):
        partial = path / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(path / name)
    return path


def _read_tensors(path: pathlib.Path) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        data = (path / FILE).read_bytes()
    except OSError as error:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        raise PeftError(
            f"{pickled[0]} is a pickle, which can run any code when it is read, so it is refused. "
            "If you trust it, save the adapter again in PEFT: model.save_pretrained(FOLDER)"
            if pickled
            else f"{FILE} cannot be read ({error}): fetch it"
        ) from error
    safetensors = _safetensors()
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise PeftError(f"{FILE} is truncated or damaged ({error}). Fetch it again") from error
    tensors = {}
    for key, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise PeftError(
                f"{key} in {FILE} is of {entry['dtype']}; only {list(_DTYPES)} are read"
            )
        array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        tensors[key] = array.reshape(entry["shape"])
    _check_finite(tensors)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _check_finite(tensors: Mapping[str, Array]) -> None:
    for key, x in tensors.items():
        if not np.isfinite(x).all():
            raise PeftError(f"{key} holds NaN or infinity: fetch it again, or train it anew")


def _digest(config: PeftConfig, tensors: Mapping[str, Array]) -> str:
    """Returns the sha256 of all that decides what an adapter computes."""
    fields = dataclasses.asdict(config)
    for name in _NOT_DIGESTED:
        del fields[name]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for key in sorted(tensors):
        x = tensors[key]
        digest.update(f"{key} {x.dtype.name} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def _where_else(folder: pathlib.Path, path: pathlib.Path) -> str:
    """Says what is in a folder that has no adapter."""
    if not folder.is_dir():
        return f"{folder} is not a folder: give the one that holds {config_file.FILE}"
    names = sorted(file.parent.name for file in folder.glob(f"*/{config_file.FILE}"))
    if (folder / config_file.FILE).is_file():
        names.insert(0, "default")
    found = f"it holds the adapters {names}: pass adapter_name" if names else "fetch it"
    return f"{path} has no {config_file.FILE}; {found}"


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise PeftError(
            "PEFT adapters are read and written with safetensors: "
            "pip install 'dora-jax[huggingface]'"
        ) from error
    return safetensors
