"""The parameters of a model, and the Hugging Face tensors that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from flax.core import meta

from dora_jax.adapters.trees import flatten, unboxed
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.quantized import QuantizedKernel
from dora_jax.errors import CheckpointError, LayoutError
from dora_jax.layers.conv import ConvLayout
from dora_jax.layers.dense import EmbedLayout
from dora_jax.layers.registry import find_layout
from dora_jax.model import modules_of, parameter_tree, with_parameter_tree

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from dora_jax.names.name_map import NameMap


@dataclasses.dataclass(frozen=True)
class Slice:
    """The part of a parameter that one tensor holds: all of it, or one index of its stack axes.

    Attributes:
      tensor: the tensor's name.
      tensor_shape: its shape.
      path: the dotted path that the parameter of this one layer has where layers are numbered.
      shape: of that parameter.
      index: the position in the stack.
      axes: of a kernel with several in or out axes; else None.
    """

    tensor: str
    tensor_shape: tuple[int, ...]
    path: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    axes: KernelAxes | None

    def from_tensor(
        self, names: NameMap, tensor: Shaped[np.ndarray, "..."]
    ) -> Shaped[np.ndarray, "..."]:
        """Returns the slice's value."""
        return names.from_hf(self.path, self.shape, lambda name: tensor, self.axes)

    def to_tensor(
        self, names: NameMap, value: Shaped[np.ndarray, "..."]
    ) -> Shaped[np.ndarray, "..."]:
        """Returns the tensor for a slice's value."""
        (tensor,) = names.to_hf(self.path, value, self.axes).values()
        return tensor


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of a parameter that some devices hold: `start` to `stop` of each axis."""

    bounds: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(stop - start for start, stop in self.bounds)

    def slice_of(self, index: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[slice, ...]] | None:
        """Returns where the region holds a slice of the stack.

        Args:
          index: of the slice, in the parameter's stack.

        Returns:
          The slice's index in the region, and the part of the slice that is there. None if the
          region holds nothing of the slice.
        """
        stack = self.bounds[: len(index)]
        if any(not start <= i < stop for i, (start, stop) in zip(index, stack, strict=True)):
            return None
        where = tuple(i - start for i, (start, _) in zip(index, stack, strict=True))
        return where, tuple(slice(*bounds) for bounds in self.bounds[len(index) :])


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    Attributes:
      path: dotted.
      value: an array, or its shape and dtype.
      sharding: the sharding that its new array gets; None for the default device.
      axes: of a kernel with several in or out axes, without its stack axes; else None.
    """

    path: str
    value: Any
    sharding: jax.sharding.Sharding | None = None
    axes: KernelAxes | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, its stack axes included."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """The parameter's dtype."""
        return self.value.dtype

    def tensors(self, names: NameMap) -> list[str]:
        """Returns the names of the tensors that hold it."""
        return names.tensor_names(self.path, self._stack(names))

    def slices(self, names: NameMap) -> Iterator[Slice]:
        """Returns its slices, one for each tensor."""
        stack = self._stack(names)
        shape = self.shape[len(stack) :]
        module, _, name = self.path.rpartition(".")
        numbered = names.find(module).names(stack)
        for index, theirs in zip(np.ndindex(*stack), numbered, strict=True):
            path = f"{names.path(theirs)}.{name}" if stack else self.path
            (tensor,) = names.tensor_names(path)
            tensor_shape = names.tensor_shape(path, shape, self.axes)
            yield Slice(tensor, tensor_shape, path, shape, index, self.axes)

    def regions(self) -> dict[Any, Region]:
        """Returns the distinct parts of the parameter that this process's devices hold."""
        whole = tuple((0, size) for size in self.shape)
        if self.sharding is None:
            return {whole: Region(whole)}
        indices = self.sharding.addressable_devices_indices_map(self.shape).values()
        return {(bounds := self._bounds(index)): Region(bounds) for index in indices}

    def place(self, buffers: Mapping[Any, np.ndarray]) -> jax.Array:
        """Returns the parameter's array.

        Args:
          buffers: the value of each region, by the keys of `regions`.
        """
        if self.sharding is None:
            (value,) = buffers.values()
            return jax.block_until_ready(jax.device_put(value))  # jnp.asarray would copy
        devices = self.sharding.addressable_devices_indices_map(self.shape)
        shards = [
            jax.device_put(buffers[self._bounds(index)], device)
            for device, index in devices.items()
        ]
        array = jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)
        return jax.block_until_ready(array)  # so that the host's buffers can be freed

    def check_concrete(self) -> None:
        """Raises `CheckpointError` if the value is abstract, or quantised."""
        if isinstance(self.value, QuantizedKernel):
            raise CheckpointError(
                f"{self.path} is quantised, and a folder holds floats: merge into the dequantised "
                "kernels first"
            )
        if isinstance(self.value, jax.ShapeDtypeStruct):
            raise CheckpointError(f"{self.path} is a shape without a value: nothing to write")

    def _bounds(self, index: Sequence[slice] | None) -> tuple[tuple[int, int], ...]:
        index = tuple(slice(None) for _ in self.shape) if index is None else index
        return tuple(part.indices(n)[:2] for part, n in zip(index, self.shape, strict=True))

    def _stack(self, names: NameMap) -> tuple[int, ...]:
        return self.shape[: len(names.find(self.path.rpartition(".")[0]).stacked)]


def parameters_of(
    model: Any, *, shardings: Any = None, axes: Mapping[str, KernelAxes] | None = None
) -> list[Parameter]:
    """Returns the parameters of an NNX model or of a tree, in the order of its leaves.

    Arguments are those of `load_checkpoint`.

    Raises:
      AdapterError: the model is adapted.
      CheckpointError: `shardings` lacks a parameter.
    """
    axes = {**_several_axes(model), **(axes or {})}
    flat = _flatten(parameter_tree(model))
    if isinstance(shardings, jax.sharding.Sharding):
        placed: Mapping[str, Any] = dict.fromkeys(flat, shardings)
    else:
        placed = {} if shardings is None else _flatten(shardings)
        if shardings is not None and (missing := sorted(flat.keys() - placed.keys())):
            raise CheckpointError(f"shardings has none for {', '.join(missing)}")
    return [
        Parameter(path, value, placed.get(path, _own_sharding(value)), axes.get(path))
        for path, value in flat.items()
    ]


def replace_parameters(model: Any, values: Sequence[Any]) -> Any:
    """Returns a copy of a model or tree with other values, in the order of `parameters_of`."""
    leaves, structure = jax.tree.flatten(parameter_tree(model), is_leaf=_is_leaf)
    new = [_with_value(leaf, value) for leaf, value in zip(leaves, values, strict=True)]
    return with_parameter_tree(model, jax.tree.unflatten(structure, new))


def _is_leaf(x: Any) -> bool:
    return isinstance(x, nnx.Variable | meta.AxisMetadata | QuantizedKernel | jax.sharding.Sharding)


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns the values of a tree's leaves by dotted path, out of their boxes."""
    return {
        ".".join(path): unboxed(leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf)
        for path, leaf in flatten(tree, _is_leaf).items()
    }


def _with_value(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if isinstance(leaf, meta.AxisMetadata) else value


def _own_sharding(value: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding that a value was given; None for one on the default device."""
    if isinstance(value, jax.Array) and not value.committed:
        return None
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def _several_axes(model: Any) -> dict[str, KernelAxes]:
    """Returns the axes of kernels with several in or out axes, which torch flattens."""
    found: dict[str, KernelAxes] = {}
    for path, module in modules_of(model).items():
        layout = find_layout(type(module))
        if layout is None or isinstance(layout, (ConvLayout, EmbedLayout)):
            continue
        try:
            axes = layout.axes(module, {})
        except LayoutError:  # an equation given with each call
            continue
        if len(axes.inputs) > 1 or len(axes.outputs) > 1:
            found[".".join((*path, layout.kernel))] = axes
    return found
