"""A summary of a model's adapted layers: data, and a table to print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dora_jax.adapters.trees import Tree
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError
from dora_jax.model import (
    ModelLayer,
    Plain,
    adapt_abstract,
    adapter_shapes,
    adapter_tree,
    base_parameters,
    is_adapted,
    model_layers,
)

if TYPE_CHECKING:
    from flax import linen, nnx

    from dora_jax.linen import DoRAModel, ExampleCall


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
      path: dotted module path.
      layer: the class of the layer.
      stack, inputs, outputs: the shape of its kernel, by kind of axis.
      dtype: of its kernel.
      rank: of its low-rank factors.
      alpha: of the scaling.
      parameters: how many parameters of the layer are trained.
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
        """The number of all trained parameters: of adapters and of modules trained in full."""
        return self.saved_parameters + sum(layer.parameters for layer in self.layers)

    @property
    def trainable_share(self) -> float:
        """The ratio of trainable parameters to parameters of the base model."""
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


@overload
def summary(
    model: nnx.Module,
    config: DoRAConfig | None = None,
    *,
    inputs: Sequence[Any] | None = None,
) -> Summary: ...


@overload
def summary(
    model: linen.Module | DoRAModel,
    config: DoRAConfig | None = None,
    *,
    params: Tree,
    adapters: Tree | None = None,
    inputs: Sequence[Any] | ExampleCall | None = None,
) -> Summary: ...


def summary(
    model: Any,
    config: DoRAConfig | None = None,
    *,
    params: Any = None,
    adapters: Any = None,
    inputs: Any = None,
) -> Summary:
    """Returns a summary of a model's adapted layers.

    With `config` this is a dry run: it shows what `apply_dora` would adapt, and makes no array.

    Args:
      model: an adapted NNX model, or a `DoRAModel`; with `config`, a model not yet adapted, whose
        arrays may be abstract.
      config: for a dry run.
      params: of a Linen model.
      adapters: of a `DoRAModel`, to be checked against it.
      inputs: for a dry run, arguments of an example call, as for `apply_dora`.

    Raises:
      TypeError: the model is no Flax model, or `params` are missing.
      AdapterError: the model is not adapted and there is no `config`, or it is and there is one.
      DoRAError: in a dry run, see `apply_dora`.

    Example:
      >>> from flax import nnx
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> print(dora.summary(model, dora.DoRAConfig(rank=2)))
      path    layer   stack  in  out  dtype    rank  alpha  parameters
      (root)  Linear         4   3    float32  2     16     17
      17 trainable parameters: 113.333% of 15
    """
    adapted = is_adapted(model)
    if not adapted and config is None:
        raise AdapterError("the model is not adapted: pass config=... for a dry run")
    if adapted and config is not None:
        raise AdapterError("the model is adapted already: a dry run takes the plain model")
    if config is not None:
        model = adapt_abstract(model, config, Plain(params=params, inputs=inputs))
    if adapters is not None:
        adapter_tree(model, adapters)
    base = base_parameters(model, params)
    layers = model_layers(model)
    rows = tuple(_row(layer, base[(*path, layer.layout.kernel)]) for path, layer in layers.items())
    saved = (math.prod(s) for p, s in adapter_shapes(model).items() if p[:-1] not in layers)
    return Summary(rows, sum(saved), sum(math.prod(x.shape) for x in base.values()))


def _row(layer: ModelLayer, kernel: Any) -> LayerSummary:
    settings, axes = layer.settings, layer.axes
    sizes = axes.shapes(kernel.shape, settings.rank)
    trained = dataclasses.replace(settings, precomputed=False).parameter_names
    stack, inputs, outputs = (tuple(kernel.shape[i] for i in group) for group in axes)
    return LayerSummary(
        path=".".join(layer.path),
        layer=layer.layer_class.__name__,
        stack=stack,
        inputs=inputs,
        outputs=outputs,
        dtype=str(np.dtype(kernel.dtype)),
        rank=settings.rank,
        alpha=settings.alpha,
        parameters=sum(math.prod(sizes[name]) for name in trained),
    )
