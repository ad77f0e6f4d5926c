"""Safetensors files: their headers, and their tensors one by one."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import ml_dtypes
import numpy as np

from dora_jax.disk.json_file import IS_LFS_POINTER, LFS_POINTER, LONGEST_NAME, is_file, reason
from dora_jax.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtyping import Shaped


FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The floating dtypes that are read, by their names in safetensors."""
DTYPES = FLOATS | {
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
"""All dtypes that are read."""
# 100,000 tensors take 15 MB.
_LONGEST_HEADER = 32_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file.

    Attributes:
      file: the safetensors file.
      name: of the tensor.
      dtype: its name in safetensors, such as `"BF16"`.
      shape: of the tensor.
      start: the tensor's first byte in the file.
      nbytes: its number of bytes.
    """

    file: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Shaped[np.ndarray, "..."]:
        """Reads the tensor.

        The file is read and not mapped, since mapped pages count as the process's memory.

        Raises:
          CheckpointError: the dtype is not one of `DTYPES`, or the file ends before the tensor.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.file} has dtype {self.dtype}, which cannot be read. Save "
                f"the model in one of {', '.join(DTYPES)}"
            )
        data = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start)
        if data.size != self.nbytes:
            raise CheckpointError(f"{self.file} is truncated. Fetch it again")
        return data.view(DTYPES[self.dtype]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
      tensors: the tensors by name.
      metadata: strings by key.
    """

    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, str]


def safetensors() -> Any:
    """Returns the module `safetensors`.

    Raises:
      CheckpointError: it is not installed.
    """
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError(
            "Hugging Face checkpoints and PEFT adapters are read and written with safetensors: "
            "pip install 'dora-jax[huggingface]'"
        ) from error
    return safetensors


def _header_length(stream: BinaryIO) -> int:
    """Returns the length of the header that follows; raises `CheckpointError`."""
    start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise CheckpointError(f"{IS_LFS_POINTER}.")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _LONGEST_HEADER:
        raise CheckpointError(
            f"truncated or damaged (a header of {length:,} bytes). Fetch it again."
        )
    return length


def read_header(file: pathlib.Path) -> Header:
    """Reads the header of a file, and checks it against the file's length.

    Raises:
      CheckpointError: the file is missing, truncated or damaged. The message lacks the file's name.
    """
    if not is_file(file):
        found = (
            "no regular file. Fetch it again." if os.path.lexists(file) else "missing. Fetch it."
        )
        raise CheckpointError(found)
    library = safetensors()
    try:
        with file.open("rb") as stream:
            length = _header_length(stream)
        with library.safe_open(file, framework="numpy"):  # checks the header and the file's length
            pass
        with file.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(length))
    except (library.SafetensorError, OSError, RecursionError) as error:
        raise CheckpointError(f"truncated or damaged ({reason(error)}). Fetch it again.") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"damaged (__metadata__ must be an object, not {metadata!r}). Fetch it again."
        )
    if long := [name for name in header if len(name) > LONGEST_NAME]:
        raise CheckpointError(
            f"damaged (the name of a tensor has {len(long[0]):,} characters: {long[0][:40]}...). "
            "Fetch it again."
        )
    return Header(
        {
            name: StoredTensor(
                file,
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        },
        metadata,
    )
