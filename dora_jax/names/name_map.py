"""Names: which module of a Hugging Face model a module of a Flax model stands for.

A `NameMap` is data, the same for base weights and for adapters, and serves a model whose layers are
numbered modules (`layers.3.mlp.up_proj`) and one whose layers are stacked by `scan` or `vmap`
(`layers.mlp.up_proj`, kernel `(layers, in, out)`). A map for a model of your own:

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
from dora_jax.names.torch_layout import (
    Interleaved,
    NameMapError,
    from_hf_order,
    from_weight,
    to_hf_order,
    to_weight,
)

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
"""Parameters of Flax layers, and torch's names for them; one that is not here keeps its name."""
REST = "{*}"


@dataclasses.dataclass(frozen=True)
class HFModule:
    """A Hugging Face module.

    Attributes:
      name: its dotted path, such as `"model.layers.{i}.self_attn.q_proj"`.
      features: the order of out features in the Flax layer, if it is another one.
      transposed: its weight is `(in, out)`, as that of GPT-2's `Conv1D`, not `(out, in)`.
      stacked: placeholders of the name for which the Flax layer has stack axes, in their order.
    """

    name: str
    features: Interleaved | None = None
    transposed: bool = False
    stacked: tuple[str, ...] = ()

    def names(self, stack: tuple[int, ...] = ()) -> list[str]:
        """Returns one name for each slice of the stack, of shape `stack`; the last axis is fastest.

        Raises:
          NameMapError: the stack has another number of axes than the name has placeholders.
        """
        if len(stack) != len(self.stacked):
            raise NameMapError(
                f"{self.name}: the Flax kernel has {len(stack)} stack axes, its name has "
                f"placeholders for {len(self.stacked)}. Write one for each in the name map: "
                "'layers.{i}.mlp': 'model.layers.{i}.mlp'"
            )
        indices = (dict(zip(self.stacked, index, strict=True)) for index in np.ndindex(*stack))
        return [_fill(self.name, index) for index in indices]

    def to_hf_order(self, x: Array, axis: int = -1) -> Array:
        """Returns an array whose `axis` is of a Flax layer's out features in the other order."""
        return to_hf_order(x, self.features, axis)

    def from_hf_order(self, x: Array, axis: int = -1) -> Array:
        """Returns an array whose `axis` is of Hugging Face's out features in the other order."""
        return from_hf_order(x, self.features, axis)


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Which Hugging Face module each module of a Flax model stands for.

    Attributes:
      modules: dotted paths of Flax modules and of Hugging Face modules. `{i}` stands for a number,
        or, where the Flax path lacks that part, for a stack axis in front of the arrays; there may
        be several (`"layers.{i}.experts.{e}.up"`).
      parameters: names of parameters in Flax layers, and torch's; one not listed keeps its name.

    Raises:
      NameMapError: placeholders differ between two names, or two modules have one name.
    """

    modules: Mapping[str, str | HFModule] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, str] = dataclasses.field(default_factory=PARAMETERS.copy)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for ours, module in self._items:
            if sorted(_placeholders(ours)) != sorted(_placeholders(module.name)):
                raise NameMapError(f"{ours!r} and {module.name!r} differ in their placeholders")
            if (other := seen.setdefault(module.name, ours)) != ours:
                raise NameMapError(f"{ours!r} and {other!r} both stand for {module.name!r}")

    def __or__(self, other: NameMap | Mapping[str, str | HFModule]) -> NameMap:
        """Returns a map with the modules of both; those of `other` count where both have one."""
        if not isinstance(other, NameMap):
            other = NameMap(other)
        return NameMap(
            {**self.modules, **other.modules},
            {**self.parameters, **other.parameters},
        )

    def inside(self, ours: str = "", theirs: str = "") -> NameMap:
        """Returns the map for models that hold these as parts of those names.

        Example:
          >>> BERT.inside("encoder", "bert").find("encoder.layers.0.output").name
          'bert.encoder.layer.0.output.dense'
        """
        return NameMap(
            {
                _join(ours, path): dataclasses.replace(module, name=_join(theirs, module.name))
                for path, module in self._items
            },
            self.parameters,
        )

    def find(self, path: str) -> HFModule:
        """Returns the Hugging Face module for the dotted path of a Flax module.

        Raises:
          NameMapError: the path is not in the map; the message has the nearest ones.
        """
        for (ours, module), (regex, _) in zip(self._items, self._regexes, strict=True):
            if match := regex.fullmatch(path + "."):
                stacked = tuple(p for p in _placeholders(ours) if p not in _values(match))
                name = _fill(module.name, _values(match))
                return dataclasses.replace(module, name=name, stacked=stacked)
        near = difflib.get_close_matches(path, self.modules, n=3, cutoff=0.0)
        raise NameMapError(
            f"{path or 'the model'}: the name map does not say which Hugging Face module this is. "
            f"Nearest entries: {near}. Add one: names | {{{path!r}: '...'}}"
        )

    def path(self, name: str) -> str | None:
        """Returns the path of the Flax module that a Hugging Face module is, None if none is.

        Layers are numbered in it: `layers.3.mlp.up_proj`, whether or not the model stacks them.
        """
        for (ours, _), (_, regex) in zip(self._items, self._regexes, strict=True):
            if match := regex.fullmatch(name + "."):
                return _fill(ours, _values(match))
        return None

    def tensor_names(self, path: str, stack: tuple[int, ...] = ()) -> list[str]:
        """Returns the names of the tensors that make up a parameter, such as `layers.0.up.kernel`.

        Example:
          >>> LLAMA.tensor_names("layers.mlp.up_proj.kernel", (2,))
          ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
        """
        module, _, parameter = path.rpartition(".")
        name = self.parameters.get(parameter, parameter)
        return [_join(module, name) for module in self.find(module).names(stack)]

    def to_hf(self, path: str, array: Array, axes: KernelAxes | None = None) -> dict[str, Array]:
        """Returns a parameter of a Flax model as Hugging Face tensors, by name.

        Args:
          path: of the parameter, dotted.
          array: its value; further leading axes are stack, one for each placeholder that is not in
            the path.
          axes: of a kernel whose in and out axes are to be flattened, as those of `DenseGeneral`.
            By default it is `(in, out)`, or a convolution's `(*window, in, out)`.
        """
        module = self.find(path.rpartition(".")[0])
        array = np.asarray(array)
        stack = array.shape[: len(module.stacked)]
        if self._is_kernel(path, array.ndim - len(stack)):
            array = to_weight(array, axes, len(stack), module.features, module.transposed)
        elif self._is_bias(path):
            array = module.to_hf_order(array.reshape(*stack, -1))
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
          NameMapError: a tensor has another shape than the parameter needs.

        Example:
          >>> read = {"model.layers.0.mlp.up_proj.weight": np.ones((8, 4))}.__getitem__
          >>> LLAMA.from_hf("layers.0.mlp.up_proj.kernel", (4, 8), read).shape
          (4, 8)
        """
        module = self.find(path.rpartition(".")[0])
        ndim = len(module.stacked)
        # What `to_hf` would make of the parameter says which shape its tensors have.
        example = np.broadcast_to(np.empty(()), shape)
        is_kernel, is_bias = self._is_kernel(path, len(shape) - ndim), self._is_bias(path)
        if is_kernel:
            example = to_weight(example, axes, ndim, module.features, module.transposed)
        elif is_bias:
            example = example.reshape(*shape[:ndim], -1)
        tensors = []
        for name in self.tensor_names(path, shape[:ndim]):
            tensor = np.asarray(read(name))
            if tensor.shape != example.shape[ndim:]:
                raise NameMapError(
                    f"{name} has shape {tensor.shape}, {path} of shape {shape} needs "
                    f"{example.shape[ndim:]}"
                )
            tensors.append(tensor)
        array = np.stack(tensors).reshape(example.shape) if ndim else tensors[0]
        if is_kernel:
            return from_weight(array, shape, axes, ndim, module.features, module.transposed)
        return module.from_hf_order(array).reshape(shape) if is_bias else array

    def _is_kernel(self, path: str, ndim: int) -> bool:
        """Whether a parameter is one whose axes stand in another order in torch."""
        name = path.rpartition(".")[2]
        return self.parameters.get(name) == "weight" and name != "embedding" and ndim > 1

    def _is_bias(self, path: str) -> bool:
        return self.parameters.get(path.rpartition(".")[2]) == "bias"

    @functools.cached_property
    def _items(self) -> list[tuple[str, HFModule]]:
        items = [(o, HFModule(t) if isinstance(t, str) else t) for o, t in self.modules.items()]
        return sorted(items, key=lambda item: REST in item[0])

    @functools.cached_property
    def _regexes(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        """What matches the paths and the names of `_items`, in their order."""
        return [(_regex(ours, True), _regex(m.name, False)) for ours, m in self._items]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _placeholders(name: str) -> list[str]:
    return re.findall(r"\{(\w+|\*)\}", name)


def _fill(name: str, values: Mapping[str, Any]) -> str:
    """Returns a name with values for some of its placeholders."""
    return re.sub(r"\{(\w+|\*)\}", lambda match: str(values.get(match[1], match[0])), name)


def _regex(name: str, optional: bool) -> re.Pattern[str]:
    """Returns what matches a name and a closing dot; numbers as whole parts may be left out."""
    parts = []
    for part in name.split("."):
        if part == REST:
            parts.append(r"(?P<rest>.+)\.")
            continue
        number = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(part)) + r"\."
        parts.append(f"(?:{number})?" if optional and re.fullmatch(r"\{\w+\}", part) else number)
    return re.compile("".join(parts))


def _values(match: re.Match[str]) -> dict[str, str]:
    """Returns what a match of `_regex` found for the placeholders."""
    found = {name: value for name, value in match.groupdict().items() if value is not None}
    return {"*" if name == "rest" else name: value for name, value in found.items()}
