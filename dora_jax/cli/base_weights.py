"""The weights of a base checkpoint, read one by one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import CheckpointError
from dora_jax.huggingface.files import open_folder

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


class BaseWeights:
    """The weights of a Hugging Face folder, read one by one.

    A checkpoint of a model without a head names its modules without the prefix (`bert.`) that they
    have in a model with one. Such a prefix is left out here.

    Args:
      folder: with safetensors files.
      modules: names of the modules whose weights will be read.

    Raises:
      CheckpointError: a file is damaged or missing.
    """

    def __init__(self, folder: pathlib.Path, modules: Iterable[str]) -> None:
        opened = open_folder(folder)
        if opened.problems:
            raise CheckpointError(f"{folder}: {opened.problems[0]}")
        self.folder, self.tensors = folder, opened.tensors
        self._prefix = _absent_prefix(set(modules), self.tensors)

    def name(self, tensor: str) -> str:
        """Returns the name that a tensor has in the folder."""
        return tensor.removeprefix(self._prefix)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; raises `CheckpointError` if there is none of that name."""
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
    """Returns the axes of a torch weight.

    Args:
      ndim: number of its axes.
      embedding: whether it is an embedding, `(vocab, dim)`, and not `(out, in, *window)`.
      transposed: whether it is `(in, out)`.

    Example:
      >>> torch_axes(2)
      KernelAxes(stack=(), inputs=(1,), outputs=(0,))
    """
    if embedding or transposed:
        return KernelAxes((), (0,), (1,))
    return KernelAxes((), tuple(range(1, ndim)), (0,))


def _absent_prefix(modules: set[str], tensors: Iterable[str]) -> str:
    """Returns the first part of all modules' names, with a dot, if only the tensors lack it."""
    stored = {tensor.removesuffix(".weight") for tensor in tensors if tensor.endswith(".weight")}
    first = {module.partition(".")[0] for module in modules}
    rest = {module.partition(".")[2] for module in modules}
    return f"{first.pop()}." if len(first) == 1 and not modules & stored and rest & stored else ""
