"""The header of a safetensors file, and its tensors."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dora_jax.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtyping import Shaped


FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
"""The dtypes of safetensors that are read."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      file: the safetensors file.
      dtype: its name there, such as `"BF16"`.
      shape: of the tensor.
      start: the first byte in the file.
      nbytes: how many there are.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Shaped[np.ndarray, "..."]:
        """Reads the tensor, one of those in `FLOATS`.

        The file is read and not mapped: mapped pages count as the process's memory.

        Raises:
          CheckpointError: the file ends before the tensor does.
        """
        data = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start)
        if data.size != self.nbytes:
            raise CheckpointError(f"{self.file} is truncated. Fetch it again")
        return data.view(FLOATS[self.dtype]).reshape(self.shape)


def safetensors() -> Any:
    """Returns the module `safetensors`, or says how to install it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError(
            "Hugging Face checkpoints are read and written with safetensors: "
            "pip install 'dora-jax[huggingface]'"
        ) from error
    return safetensors


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file by name."""
    if not file.is_file():
        raise CheckpointError("missing. Fetch it.")
    library = safetensors()
    try:
        with library.safe_open(file, framework="numpy"):  # checks the header and the file's length
            pass
    except library.SafetensorError as error:
        raise CheckpointError(f"truncated or damaged ({error}). Fetch it again.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
