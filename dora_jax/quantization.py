"""Quantised bases, of either front end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from flax import linen, nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.trees import Tree
from dora_jax.decomposition.quantize import Quantization
from dora_jax.errors import AdapterError
from dora_jax.layers.quantizing import ADAPTED, Chosen
from dora_jax.linen import DoRAModel, ExampleCall
from dora_jax.nnx.variables import M


@overload
def quantize(
    model: M,
    quantization: str | Quantization,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    inputs: Sequence[Any] | None = None,
) -> M: ...


@overload
def quantize(
    model: linen.Module,
    quantization: str | Quantization,
    *,
    params: Tree,
    inputs: Sequence[Any] | ExampleCall,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
) -> dict[str, Any]: ...


def quantize(
    model: Any,
    quantization: str | Quantization,
    *,
    params: Any = None,
    inputs: Any = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
) -> Any:
    """Quantises the kernels of a plain Flax model, which runs on them as it is.

    A kernel becomes codes of 4 or 8 bits and scales, and is dequantised where a layer uses it.
    `apply_dora` then adapts the quantised model.

    Args:
      model: an `nnx.Module`, or a `linen.Module` with its `params`. What is given stays as it is.
      quantization: "nf4", "int4", "int8" or "fp8"; a `Quantization` for other blocks, or for scales
        that are quantised too.
      params: Linen: the module's `params` collection.
      inputs: arguments of an example call, which is traced, not run. Needed for Linen; NNX needs it
        for layers whose equation is given with each call.
      target_modules: names of layers, as in `DoRAConfig`; None for every layer with a kernel, the
        embeddings included.
      exclude_modules: names of layers, or of modules that hold them, to leave as they are.

    Returns:
      NNX: a model. Linen: parameters, for the same module.

    Raises:
      TypeError: `model` is of neither kind, or an argument is missing.
      ConfigError: the format is not known, or a pattern matches nothing.
      AdapterError: the model is adapted already, or no layer is left.
      LayoutError: how a layer contracts its kernel is not known, or another library has quantised
        it; names the layer.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> model = nnx.Linear(128, 3, rngs=nnx.Rngs(0))
      >>> quantized = dora.quantize(model, "nf4")
      >>> quantized.kernel.codes.dtype, quantized(jnp.ones((5, 128))).shape
      (dtype(uint4), (5, 3))
      >>> adapted = dora.apply_dora(quantized, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
    """
    chosen = Chosen(Quantization.of(quantization), target_modules, exclude_modules)
    if isinstance(model, nnx.Module):
        if params is not None:
            raise TypeError("an NNX model carries its arrays: leave out params")
        return dora_nnx.quantize(model, chosen, inputs)
    if isinstance(model, DoRAModel):
        raise AdapterError(ADAPTED)
    if isinstance(model, linen.Module):
        if params is None or inputs is None:
            raise TypeError("a Linen module needs params and inputs too")
        return dora_linen.quantize(model, chosen, params, inputs)
    raise TypeError(f"expected a flax.nnx.Module or a flax.linen.Module, got {type(model)}")
