"""`DoRAModel`: a Linen module that reads a second collection, the adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.trees import Tree, check_shapes, get_in, overlay, set_in, tree_shapes
from dora_jax.config import DoRAConfig
from dora_jax.decomposition.base import base_changed
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.linen.interceptor import ADAPTER_KEY, intercept
from dora_jax.linen.stack_axes import stack_at


@dataclasses.dataclass(frozen=True, eq=False)
class DoRAModel:
    """A Linen module that reads a second collection, `dora`: the adapters.

    Made by `apply_dora`. `apply` takes the arguments of `flax.linen.Module.apply`.

    Attributes:
      module: the module as it was.
      config: the configuration it was adapted with.
      layers: the adapted layers by module path.
      base: by module path, what is kept of each frozen kernel (norm and mark).
      shapes: of every array of the adapter tree, by path.
    """

    module: nn.Module
    config: DoRAConfig
    layers: Mapping[Path, AdaptedLayer]
    base: Mapping[Path, Mapping[str, jax.Array]]
    shapes: Mapping[Path, tuple[int, ...]]

    def apply(
        self,
        variables: Tree,
        *args: Any,
        rngs: Any = None,
        method: Callable[..., Any] | str | None = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Applies the adapted module, as `flax.linen.Module.apply` does.

        Args:
          variables: the module's collections, and `dora`, the adapters.
          *args: the module's arguments.
          rngs: keys by stream; adapter dropout is active if there is a `dropout` stream.
          method: as for `Module.apply`.
          mutable: as for `Module.apply`; `params` comes back without the adapters.
          **kwargs: the module's keyword arguments.

        Raises:
          AdapterError: `dora` is missing, or does not fit the model; names the layer.
        """
        check_collections(variables)
        adapters = variables["dora"]
        check_adapters(self, adapters)
        others = {name: value for name, value in variables.items() if name != "dora"}
        others["params"] = self._params_with_adapters(variables["params"], adapters)
        dropout = bool(self.config.dropout) and rngs is not None and _has_dropout(rngs)
        with nn.intercept_methods(functools.partial(intercept, self.layers, dropout)):
            result = self.module.apply(
                others, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
            )
        if mutable is False:
            return result
        output, updated = result
        return output, _without_adapters(updated)

    def _params_with_adapters(self, params: Tree, adapters: Tree) -> dict[str, Any]:
        result = overlay(params, saved_modules(self.layers, adapters))
        for path in self.layers:
            layer = self.layers[path]
            base = {f"base_{k}": v for k, v in self.base[path].items()}
            beside = {**get_in(adapters, path), **base}
            if any(layer.positions):
                ndim = layer.call_axes.ndim
                beside = {k: stack_at(v, layer.positions, ndim) for k, v in beside.items()}
            result = set_in(result, path, {**get_in(params, path), ADAPTER_KEY: beside})
        return result


def check_collections(variables: Tree) -> None:
    if missing := {"params", "dora"} - set(variables):
        raise AdapterError(
            f"variables has no collection {min(missing)!r}: apply to {{'params': ..., 'dora': "
            "adapters}, or use the module itself to run the base"
        )


def check_adapters(model: DoRAModel, adapters: Tree) -> None:
    """Raises `AdapterError` if an adapter array is missing, unknown or of a wrong shape.

    Hoisted adapters, with a scale in place of the magnitude, fit too.
    """
    wanted = model.shapes
    given = tree_shapes(adapters)
    if any((*path, "scale") in given for path in model.layers):
        scales = {
            (*path, "scale"): model.base[path]["norm"].shape
            for path, layer in model.layers.items()
            if layer.settings.decompose
        }
        magnitudes = {(*path, "magnitude") for path in model.layers}
        wanted = {p: s for p, s in wanted.items() if p not in magnitudes} | scales
    check_shapes(adapters, wanted)


def check_base(model: DoRAModel, params: Tree) -> None:
    """Raises `AdapterError` if a kernel is not the one its adapter was made for, naming the layer.

    An adapted layer whose kernel was exchanged gives NaN, and merges to NaN; this says which,
    except under a transformation such as `jax.jit`, where the values are not known.
    """
    for path, layer in model.layers.items():
        kernel = meta.unbox(get_in(params, (*path, layer.layout.kernel)))
        changed = base_changed(kernel, model.base[path], layer.axes)
        if not isinstance(changed, jax.core.Tracer) and np.any(changed):
            raise AdapterError(
                f"{layer_name(path)}: the kernel changed since apply_dora, so its stored norm is "
                "wrong. Load the base first, then adapt it"
            )


def _has_dropout(rngs: Any) -> bool:
    """Whether `rngs` has a stream for dropout; a single key serves every stream."""
    return not isinstance(rngs, Mapping) or "dropout" in rngs


def saved_modules(layers: Iterable[Path], adapters: Tree) -> Tree:
    """Returns the part of an adapter tree that is of modules trained in full."""
    for path in layers:
        adapters = set_in(adapters, path, {})
    return adapters


def _without_adapters(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {k: _without_adapters(v) for k, v in tree.items() if k != ADAPTER_KEY}
