"""The weights of a base checkpoint, read one by one."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import CheckpointError
from dora_jax.huggingface.files import open_folder

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


class Base:
    """The weights of a Hugging Face folder, read one by one, whatever stands before their names.

    A checkpoint of a model without a head names its modules without the part (`bert.`) that the
    model with one puts before them.

    Args:
      folder: with safetensors files.
      modules: the names of the modules that are looked for.
    """

    def __init__(self, folder: pathlib.Path, modules: list[str]) -> None:
        opened = open_folder(folder)
        if opened.problems:
            raise CheckpointError(f"{folder}: {opened.problems[0]}")
        self.folder, self.tensors = folder, opened.tensors
        self._strip = ""
        if modules and not any(f"{m}.weight" in self.tensors for m in modules):
            first = {m.partition(".")[0] for m in modules}
            bare = [m.partition(".")[2] for m in modules]
            if len(first) == 1 and any(f"{m}.weight" in self.tensors for m in bare):
                self._strip = first.pop() + "."

    def name(self, tensor: str) -> str:
        """Returns the name in the folder of a tensor."""
        return tensor.removeprefix(self._strip)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; raises `CheckpointError` if it is not there."""
        if self.name(tensor) not in self.tensors:
            raise CheckpointError(
                f"{self.folder} has no tensor {self.name(tensor)}, for which there is an adapter: "
                "is it the base that the adapter was trained for?"
            )
        return self.tensors[self.name(tensor)].shape

    def read(self, tensor: str) -> Array:
        """Reads a tensor."""
        self.shape(tensor)
        return self.tensors[self.name(tensor)].read()


def torch_axes(ndim: int, *, embedding: bool = False, transposed: bool = False) -> KernelAxes:
    """Returns the axes of a torch weight: `(out, in, *window)`, of a table `(vocab, dim)`.

    Example:
      >>> torch_axes(2)
      KernelAxes(stack=(), inputs=(1,), outputs=(0,))
    """
    if embedding or transposed:
        return KernelAxes((), (0,), (1,))
    return KernelAxes((), tuple(range(1, ndim)), (0,))
