"""What of a model is adapted, or would be: a table to print, and as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx
from flax.core import meta

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
      path: dotted module path.
      layer: the class of the layer.
      stack, inputs, outputs: the shape of its kernel, by kind of axis.
      dtype: of its kernel.
      rank: of the low-rank direction.
      alpha: of the scaling.
      parameters: how many it trains.
    """

    path: str
    layer: str
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: str
    rank: int
    alpha: float
    parameters: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The adapted layers of a model; `print` shows it as a table.

    Attributes:
      layers: one entry for each adapted layer.
      saved_parameters: parameters of modules trained in full.
      base_parameters: parameters of the base model, those modules included.
    """

    layers: tuple[LayerSummary, ...]
    saved_parameters: int
    base_parameters: int

    @property
    def trainable_parameters(self) -> int:
        """All that is trained: adapters and modules trained in full."""
        return self.saved_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def trainable_share(self) -> float:
        """Trainable parameters over those of the base model."""
        return self.trainable_parameters / self.base_parameters

    def __str__(self) -> str:
        header = ("path", "layer", "stack", "in", "out", "dtype", "rank", "alpha", "parameters")
        rows = [header] + [
            (
                row.path or "(root)",
                row.layer,
                *("x".join(map(str, shape)) for shape in (row.stack, row.inputs, row.outputs)),
                row.dtype,
                str(row.rank),
                f"{row.alpha:g}",
                f"{row.parameters:,}",
            )
            for row in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        saved = f", {self.saved_parameters:,} of them in modules trained in full"
        return "\n".join(
            [
                *lines,
                f"{self.trainable_parameters:,} trainable parameters"
                f"{saved if self.saved_parameters else ''}: {self.trainable_share:.3%} of "
                f"{self.base_parameters:,}",
            ]
        )


def summary(
    model: Any,
    config: DoRAConfig | None = None,
    *,
    params: Any = None,
    adapters: Any = None,
    **kwargs: Any,
) -> Summary:
    """Returns what of a model is adapted; with `config`, what would be (no array is made).

    Args:
      model: an adapted NNX model, or a `DoRAModel`; with `config`, a model not yet adapted, whose
        arrays may be abstract.
      config: for a dry run.
      params: of a Linen model.
      adapters: of a `DoRAModel`, to be checked against it.
      **kwargs: in a dry run, the further arguments of `apply_dora` (`inputs`).

    Raises:
      TypeError: the model is of neither kind, or `params` are missing.
      AdapterError: nothing is adapted and there is no `config`; or the contrary.
      DoRAError: in a dry run, what `apply_dora` raises.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> print(dora.summary(model, dora.DoRAConfig(rank=2)))
      path    layer   stack  in  out  dtype    rank  alpha  parameters
      (root)  Linear         4   3    float32  2     16     17
      17 trainable parameters: 113.333% of 15
    """
    if isinstance(model, nnx.Module):
        if config is not None:
            model = dora_nnx.apply_dora(_abstract_nnx(model), config, rngs=nnx.Rngs(0), **kwargs)
        return _summarize_nnx(model)
    if not isinstance(model, (linen.Module, dora_linen.DoRAModel)):
        raise TypeError(f"expected a Flax module or a DoRAModel, got {type(model)}")
    if params is None:
        raise TypeError("a Linen model needs params too")
    if isinstance(model, linen.Module):
        if config is None:
            raise AdapterError("the module is not adapted: pass config=... for a dry run")
        params = _abstract(params)
        model, _ = dora_linen.apply_dora(
            model, config, params=params, rng=jax.random.key(0), **kwargs
        )
    elif config is not None:
        raise AdapterError("the model is adapted already: a dry run takes the module itself")
    elif adapters is not None:
        dora_linen.check_adapters(model, adapters)
    return _summarize_linen(model, params)


def _summarize_nnx(model: nnx.Module) -> Summary:
    layers = []
    for path, layer in dora_nnx.adapted_layers(model):
        kernel, axes = dora_nnx.kernel_and_axes(layer)
        name = type(layer).__mro__[2].__name__
        layers.append(_row(".".join(path), name, kernel, axes, layer.settings))
    if not layers and not jax.tree.leaves(nnx.state(model, dora_nnx.DoRAParam)):
        raise AdapterError("the model is not adapted: pass config=... for a dry run")
    base = _size(nnx.state(model, nnx.Param))
    return Summary(tuple(layers), _size(nnx.state(model, dora_nnx.SavedParam)), base)


def _summarize_linen(model: dora_linen.DoRAModel, params: Mapping[str, Any]) -> Summary:
    layers = []
    for path, layer in model.layers.items():
        own: Any = params
        for key in path:
            own = own[key]
        kernel = meta.unbox(own[layer.layout.kernel])
        layers.append(
            _row(".".join(path), type(layer.module).__name__, kernel, layer.axes, layer.settings)
        )
    saved = (math.prod(s) for path, s in model.shapes.items() if path[:-1] not in model.layers)
    return Summary(tuple(layers), sum(saved), _size(params))


def _row(
    path: str, layer: str, kernel: Any, axes: KernelAxes, settings: LayerSettings
) -> LayerSummary:
    sizes = axes.shapes(kernel.shape, settings.rank)
    trained = dataclasses.replace(settings, precomputed=False).parameter_names
    parameters = sum(math.prod(sizes[name]) for name in trained)
    stack, inputs, outputs = (tuple(kernel.shape[i] for i in group) for group in axes)
    dtype = str(np.dtype(kernel.dtype))
    return LayerSummary(
        path, layer, stack, inputs, outputs, dtype, settings.rank, settings.alpha, parameters
    )


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in _leaves(tree))


def _leaves(tree: Any) -> Iterator[Any]:
    return (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _abstract_nnx(model: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, _abstract(state))
