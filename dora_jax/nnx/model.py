"""The adapted layers of an NNX model, and its adapter tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from dora_jax.adapters.origin import Origin, check_origin, origin, remember
from dora_jax.adapters.placement import own_array
from dora_jax.adapters.trees import check_shapes, flatten
from dora_jax.decomposition.base import check_kernel
from dora_jax.errors import AdapterError, Path
from dora_jax.nnx.layers import DoRALayer, base_of, kernel_and_axes
from dora_jax.nnx.variables import DoRAParam


def named_modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Yields every module of a model with its path; a shared one once."""
    for path, module in nnx.iter_modules(model):
        yield tuple(map(str, path)), module


def adapted_layers(model: nnx.Module) -> dict[Path, Any]:
    """Returns the layers that carry an adapter, by path; a shared one once."""
    return {path: m for path, m in named_modules(model) if isinstance(m, DoRALayer)}


def checked_layers(model: nnx.Module) -> dict[Path, Any]:
    """Returns the layers that carry an adapter; raises `AdapterError` if nothing is adapted."""
    layers = adapted_layers(model)
    if not layers and not jax.tree.leaves(nnx.state(model, DoRAParam)):
        raise AdapterError("the model has no adapter: apply_dora first; a merged one has none left")
    return layers


def check_base(model: nnx.Module) -> None:
    """Raises `AdapterError` if a kernel is not the one its adapter was made for, naming the layer.

    An adapted layer whose kernel was exchanged gives NaN, and merges to NaN; this says which,
    except under a transformation such as `jax.jit`, where the values are not known.
    """
    for path, layer in checked_layers(model).items():
        kernel, axes = kernel_and_axes(layer)
        check_kernel(path, kernel.get_value(), base_of(layer), axes)


def get_adapters(model: nnx.Module) -> dict[str, Any]:
    """Returns the adapter tree: nested dicts by module path, of everything that DoRA trains.

    The tree holds the model's own arrays: copy it before a step that donates them.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> mlp = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> mlp = dora.apply_dora(mlp, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> jax.tree.map(jnp.shape, get_adapters(mlp))
      {'layers': {'0': {'lora_a': (4, 2), 'lora_b': (2, 3), 'magnitude': (3,)}}}
    """
    adapters = _string_keys(nnx.to_pure_dict(nnx.state(model, DoRAParam)))
    remember(flatten(adapters), origins(model))
    return adapters


def origins(model: nnx.Module) -> dict[Path, Origin]:
    """Returns what is remembered of the adapter arrays of each adapted layer, by path."""
    return {
        path: origin(layer.adapted.settings, changes_product=base_of(layer).init_a is not None)
        for path, layer in adapted_layers(model).items()
    }


def set_adapters(model: nnx.Module, adapters: Mapping[str, Any]) -> None:
    """Puts an adapter tree, as `get_adapters` returns it, into an adapted model.

    The model gets copies: training it leaves the tree as it is.

    Raises:
      AdapterError: names, shapes or the presence of a magnitude differ; names each. The adapters
        are known to be of other settings, such as another alpha; names the layer.
    """
    if adapters:
        checked_layers(model)
    state = nnx.state(model, DoRAParam)
    wanted = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    check_shapes(adapters, {path: variable.shape for path, variable in wanted.items()})
    given = flatten(adapters)
    check_origin(given, origins(model))
    for path, variable in wanted.items():
        variable.set_value(own_array(given[path], variable.dtype))
    nnx.update(model, state)


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
