"""Quantised bases, of either front end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import jax
from flax import linen, nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.trees import Tree, get_in, has_path
from dora_jax.decomposition.from_error import start_of_error
from dora_jax.decomposition.merge_quantized import check_original
from dora_jax.decomposition.qarray import is_qarray, kernel_of_qarray
from dora_jax.decomposition.quantize import Quantization
from dora_jax.decomposition.quantized import QuantizedKernel
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.quantized_box import QuantizedBox
from dora_jax.layers.quantizing import ADAPTED, Chosen
from dora_jax.linen import DoRAModel, ExampleCall
from dora_jax.model import adapter_tree, model_layers, modules_of, with_adapter_arrays
from dora_jax.nnx.variables import M, copy_model


@overload
def quantize(
    model: M,
    quantization: str | Quantization,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    inputs: Sequence[Any] | None = None,
    principal_rank: int = 0,
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
    principal_rank: int = 0,
) -> dict[str, Any]: ...


def quantize(
    model: Any,
    quantization: str | Quantization,
    *,
    params: Any = None,
    inputs: Any = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    principal_rank: int = 0,
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
      target_modules: names of layers or "all-linear", as in `DoRAConfig`; None for every layer with
        a kernel, the embeddings included.
      exclude_modules: names of layers, or of modules that hold them, to leave as they are.
      principal_rank: 0, or the rank of the adapters, to quantise each kernel without its directions
        of the largest singular values (QPiSSA, arXiv 2404.02948). The model is whole again once it
        is adapted in the same layers and `start_from_error` gives the adapters that part.

    Returns:
      NNX: a model. Linen: parameters, for the same module.

    Raises:
      TypeError: `model` is of neither kind, or an argument is missing.
      ConfigError: the format is not known, or a pattern matches nothing.
      AdapterError: the model is adapted already, or no layer is left; `principal_rank` is given for
        a model of shapes.
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
    chosen = Chosen(Quantization.of(quantization), target_modules, exclude_modules, principal_rank)
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


def from_qwix(params: Tree) -> dict[str, Any]:
    """Returns Linen parameters that qwix quantised with quantised kernels of this library.

    The codes stay as they are. `apply_dora` then takes the module as it was before
    `qwix.quantize_model`; a module under qwix is refused, because qwix replaces its products.

    Args:
      params: the module's `params` collection, as from `qwix.quantize_params`.

    Raises:
      LayoutError: codes of a type that `quantize` does not have (int4, int8, nf4 and float8_e4m3fn
        are read), or blocks of several lengths; names the kernel.

    Example::

        params = dora.from_qwix(qwix.quantize_params(params, abstract_quantized))
        model, adapters = dora.apply_dora(module, config, params=params, rng=rng, inputs=(x,))
    """

    def one(path: Any, x: Any) -> Any:
        names = tuple(str(getattr(key, "key", key)) for key in path)
        return QuantizedBox(kernel_of_qarray(names, x)) if is_qarray(x) else x

    return dict(jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qarray))


class Distance(NamedTuple):
    """How far a layer's kernel is from the original one, as a share of that one's length.

    Attributes:
      quantized: `||W0 - W|| / ||W||` of the quantised kernel.
      start: of `W0 + s A B`, with which the adapted layer starts.
    """

    quantized: float
    start: float


@overload
def start_from_error(model: M, original: M) -> tuple[M, dict[str, Distance]]: ...


@overload
def start_from_error(
    model: DoRAModel, original: Tree, *, params: Tree, adapters: Tree
) -> tuple[dict[str, Any], dict[str, Distance]]: ...


def start_from_error(
    model: Any, original: Any, *, params: Any = None, adapters: Any = None
) -> tuple[Any, dict[str, Distance]]:
    """Starts the adapters of a quantised base from what quantising lost.

    As LoftQ (arXiv 2310.08659) with one step: `s A B` is the nearest matrix of the adapter's rank
    to the error `W - W0`, and the magnitude the norm of `W0 + s A B`. So the adapted model starts
    nearer to the unquantised one, and not at the quantised one. Of a base that was quantised with
    `principal_rank`, what was lost has the principal part of `W`, and `s A B` takes it (QPiSSA).

    Args:
      model: an adapted NNX model of a quantised base, which stays as it is, or a `DoRAModel`.
      original: the model, or for Linen the parameters, that were quantised.
      params: Linen: the quantised parameters.
      adapters: Linen: the adapter tree.

    Returns:
      A model, or for Linen an adapter tree; and the distances of each layer by dotted path.

    Raises:
      AdapterError: a layer's kernel is not quantised, has no original, or its adapter does not
        start at zero (`layers_to_transform`, "pissa", "olora"); names it.

    Example:
      >>> import dora_jax as dora
      >>> original = nnx.Linear(128, 32, rngs=nnx.Rngs(0))
      >>> model = dora.quantize(original, "nf4")
      >>> model = dora.apply_dora(model, dora.DoRAConfig(rank=8), rngs=nnx.Rngs(1))
      >>> model, distances = dora.start_from_error(model, original)
      >>> distances["the model"].start < distances["the model"].quantized
      True
    """
    if isinstance(model, nnx.Module):
        model = copy_model(model)
    tree, distances = adapter_tree(model, adapters), {}
    originals = _kernels(model, original)
    values: dict[Path, Any] = {}
    for path, layer in model_layers(model).items():
        kernel = _kernels(model, params)[path]
        name = layer_name(path)
        if not isinstance(kernel, QuantizedKernel) or not layer.settings.rank:
            raise AdapterError(f"{name} has no quantised kernel, or no factors, to start")
        if layer.base.mask is not None or layer.base.init_a is not None:
            raise AdapterError(f"{name}: adapt it with no layers_to_transform, and another init")
        check_original(path, kernel, originals.get(path))
        start = start_of_error(layer.settings, kernel, originals[path], layer.axes)
        own = {n: getattr(start, n) for n in ("lora_a", "lora_b", "magnitude")}
        known = get_in(tree, path)
        values |= {(*path, n): x.astype(known[n].dtype) for n, x in own.items() if n in known}
        distances[name] = Distance(float(start.before), float(start.after))
    result = with_adapter_arrays(model, tree, values)
    return (result[1] if isinstance(result, tuple) else result), distances


def _kernels(model: Any, base: Any = None) -> dict[Path, Any]:
    """Returns the kernels of a model's adapted layers by path, out of its own base or another one.

    Args:
      model: an adapted model.
      base: for NNX a plain or adapted model, by default the model itself; for Linen parameters.
    """
    found: dict[Path, Any] = {}
    if isinstance(model, DoRAModel):
        for path, stored in model.layers.items():
            if has_path(base, (*path, stored.adapted.layout.kernel)):
                found[path] = stored.kernel(base)
        return found
    modules = modules_of(model if base is None else base)
    for path, layer in model_layers(model).items():
        if (own := getattr(modules.get(path), layer.layout.kernel, None)) is not None:
            found[path] = own.get_value()
    return found
