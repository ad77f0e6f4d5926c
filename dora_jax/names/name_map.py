"""Name maps: which module of a Hugging Face model each module of a Flax model is.

One `NameMap` serves base weights and adapters. It also serves both a model whose layers are
numbered modules (`layers.3.mlp.up_proj`) and one whose layers are stacked by `scan` or `vmap`
(`layers.mlp.up_proj`, kernel `(layers, in, out)`). A map for your own model:

  >>> names = NameMap({"blocks.{i}.up": "h.{i}.mlp.c_fc", "head": "lm_head"})
  >>> names.find("blocks.1.up").name
  'h.1.mlp.c_fc'
  >>> names.find("blocks.up").names((2,))  # stacked
  ['h.0.mlp.c_fc', 'h.1.mlp.c_fc']
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.names.hf_module import HFModule
from dora_jax.names.placeholders import ANY_PATH, fill, join, match_values, pattern, placeholders
from dora_jax.names.torch_layout import NameMapError, converted_shape, from_weight, to_weight

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

PARAMETERS = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
"""Parameter names in Flax layers, and in torch. A parameter that is not listed keeps its name."""


@dataclasses.dataclass(frozen=True)
class NameMap:
    """A map from the modules of a Flax model to those of a Hugging Face model.

    Attributes:
      modules: dotted paths of Flax modules, and of Hugging Face modules. A placeholder such as
        `{i}` stands for a number. Where the Flax path lacks that number, it stands for a stack axis
        in front of the layer's arrays. There may be several (`"layers.{i}.experts.{e}.up"`).
      parameters: parameter names in Flax layers, and in torch. A parameter that is not listed keeps
        its name.

    Raises:
      NameMapError: two names differ in their placeholders, or two modules have one name.
    """

    modules: Mapping[str, str | HFModule] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, str] = dataclasses.field(default_factory=PARAMETERS.copy)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for ours, module in self._items:
            if sorted(placeholders(ours)) != sorted(placeholders(module.name)):
                raise NameMapError(f"{ours!r} and {module.name!r} differ in their placeholders")
            if (other := seen.setdefault(module.name, ours)) != ours:
                raise NameMapError(f"{ours!r} and {other!r} both stand for {module.name!r}")

    def __or__(self, other: NameMap | Mapping[str, str | HFModule]) -> NameMap:
        """Returns a map with the entries of both; where both have one, that of `other`."""
        if not isinstance(other, NameMap):
            other = NameMap(other)
        return NameMap(
            {**self.modules, **other.modules},
            {**self.parameters, **other.parameters},
        )

    def inside(self, ours: str = "", theirs: str = "") -> NameMap:
        """Returns the map for models that contain these as submodules.

        Args:
          ours: the submodule's path in the Flax model.
          theirs: its path in the Hugging Face model.

        Example:
          >>> from dora_jax.names import BERT
          >>> BERT.inside("encoder", "bert").find("encoder.layers.0.output").name
          'bert.encoder.layer.0.output.dense'
        """
        return NameMap(
            {
                join(ours, path): dataclasses.replace(module, name=join(theirs, module.name))
                for path, module in self._items
            },
            self.parameters,
        )

    def find(self, path: str) -> HFModule:
        """Returns the Hugging Face module for the dotted path of a Flax module.

        Raises:
          NameMapError: the map does not list the path; the message has the nearest entries.
        """
        for (ours, module), (regex, _) in zip(self._items, self._patterns, strict=True):
            if match := regex.fullmatch(path + "."):
                values = match_values(match)
                stacked = tuple(p for p in placeholders(ours) if p not in values)
                name = fill(module.name, values)
                return dataclasses.replace(module, name=name, stacked=stacked)
        near = difflib.get_close_matches(path, self.modules, n=3, cutoff=0.0)
        raise NameMapError(
            f"{path or 'the model'}: the name map does not say which Hugging Face module this is. "
            f"Nearest entries: {near}. Add one: names | {{{path!r}: '...'}}"
        )

    def path(self, name: str) -> str | None:
        """Returns the path of the Flax module for a Hugging Face module, None if there is none.

        Its layers are numbered (`layers.3.mlp.up_proj`), even if the model stacks them.
        """
        for (ours, _), (_, regex) in zip(self._items, self._patterns, strict=True):
            if match := regex.fullmatch(name + "."):
                return fill(ours, match_values(match))
        return None

    def tensor_names(self, path: str, stack: tuple[int, ...] = ()) -> list[str]:
        """Returns the names of the tensors that hold a parameter, such as `layers.0.up.kernel`.

        Args:
          path: of the parameter, dotted.
          stack: the shape of its stack axes.

        Example:
          >>> from dora_jax.names import LLAMA
          >>> LLAMA.tensor_names("layers.mlp.up_proj.kernel", (2,))
          ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
        """
        module, _, parameter = path.rpartition(".")
        name = self.parameters.get(parameter, parameter)
        return [join(module, name) for module in self.find(module).names(stack)]

    def tensor_shape(
        self, path: str, shape: tuple[int, ...], axes: KernelAxes | None = None
    ) -> tuple[int, ...]:
        """Returns the shape of the tensors that hold a parameter of the given shape.

        Arguments are those of `from_hf`.

        Example:
          >>> from dora_jax.names import LLAMA
          >>> LLAMA.tensor_shape("layers.mlp.up_proj.kernel", (2, 4, 8))
          (8, 4)
        """
        stacked = len(self._module(path).stacked)
        return converted_shape(lambda x: self._to_torch(path, x, axes), shape)[stacked:]

    def to_hf(self, path: str, array: Array, axes: KernelAxes | None = None) -> dict[str, Array]:
        """Returns a parameter of a Flax model as Hugging Face tensors, by name.

        Args:
          path: of the parameter, dotted.
          array: the parameter. Its stack axes come first, one for each placeholder that the path
            lacks.
          axes: the axes of a kernel whose in and out axes are to be flattened, such as that of
            `DenseGeneral`. None stands for `(in, out)`, or a convolution's `(*window, in, out)`.
        """
        array = np.asarray(array)
        stack = array.shape[: len(self._module(path).stacked)]
        array = self._to_torch(path, array, axes)
        slices = array.reshape(-1, *array.shape[len(stack) :])
        return dict(zip(self.tensor_names(path, stack), slices, strict=True))

    def from_hf(
        self,
        path: str,
        shape: tuple[int, ...],
        read: Callable[[str], Array],
        axes: KernelAxes | None = None,
    ) -> Array:
        """Returns a parameter of a Flax model from Hugging Face tensors; undoes `to_hf`.

        Args:
          path: of the parameter, dotted.
          shape: of the parameter.
          read: returns a tensor by name.
          axes: as for `to_hf`.

        Raises:
          NameMapError: a tensor does not have the shape that the parameter needs.

        Example:
          >>> from dora_jax.names import LLAMA
          >>> read = {"model.layers.0.mlp.up_proj.weight": np.ones((8, 4))}.__getitem__
          >>> LLAMA.from_hf("layers.0.mlp.up_proj.kernel", (4, 8), read).shape
          (4, 8)
        """
        module = self._module(path)
        ndim = len(module.stacked)
        wanted = self.tensor_shape(path, shape, axes)
        tensors = []
        for name in self.tensor_names(path, shape[:ndim]):
            tensor = np.asarray(read(name))
            if tensor.shape != wanted:
                raise NameMapError(
                    f"{name} has shape {tensor.shape}, {path} of shape {shape} needs {wanted}"
                )
            tensors.append(tensor)
        array = np.stack(tensors).reshape(*shape[:ndim], *wanted) if ndim else tensors[0]
        if self._is_weight(path, len(shape) - ndim):
            return from_weight(array, shape, axes, ndim, module.features, module.transposed)
        return module.from_hf_order(array).reshape(shape) if self._is_bias(path) else array

    def _to_torch(self, path: str, array: Array, axes: KernelAxes | None) -> Array:
        """Returns a parameter in torch's layout, its stack axes still in front."""
        module = self._module(path)
        ndim = len(module.stacked)
        if self._is_weight(path, array.ndim - ndim):
            return to_weight(array, axes, ndim, module.features, module.transposed)
        if self._is_bias(path):
            return module.to_hf_order(array.reshape(*array.shape[:ndim], -1))
        return array

    def _module(self, path: str) -> HFModule:
        """Returns the Hugging Face module that holds a parameter."""
        return self.find(path.rpartition(".")[0])

    def _is_weight(self, path: str, ndim: int) -> bool:
        """Whether a parameter of `ndim` axes, without its stack, has other axes in torch."""
        name = path.rpartition(".")[2]
        return self.parameters.get(name) == "weight" and name != "embedding" and ndim > 1

    def _is_bias(self, path: str) -> bool:
        return self.parameters.get(path.rpartition(".")[2]) == "bias"

    @functools.cached_property
    def _items(self) -> list[tuple[str, HFModule]]:
        """The entries, those for any path last."""
        items = [(o, HFModule(t) if isinstance(t, str) else t) for o, t in self.modules.items()]
        return sorted(items, key=lambda item: ANY_PATH in item[0])

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        """Regular expressions for the paths and names of `_items`, in their order."""
        return [
            (pattern(ours, optional=True), pattern(module.name, optional=False))
            for ours, module in self._items
        ]
