"""`DoRAModel`: a Linen module that reads a second collection, the adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters.origin import Origin, check_origin, origin, remember
from dora_jax.adapters.placement import native
from dora_jax.adapters.trees import (
    Tree,
    check_shapes,
    flatten,
    get_in,
    overlay,
    set_in,
    tree_shapes,
    unboxed,
)
from dora_jax.config import DoRAConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase, check_kernel
from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.sharding import layer_entries
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.adapted import AdaptedLayer
from dora_jax.layers.layout import is_kernel, quantised_since
from dora_jax.linen.interceptor import ADAPTER_KEY, intercept
from dora_jax.linen.stack_axes import stack_at
from dora_jax.processes import spans_processes


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """An adapted layer as its model stores it.

    Attributes:
      adapted: the layer as one call sees it.
      axes: of the stored kernel.
      positions: where lifted transforms take the stack axes, the outermost transform's first.
      dtype: in which the layer multiplied in the call that was traced.
      module: a copy of the layer, for its attributes.
      box: the box around the kernel, if it is one that names what cuts each axis.
    """

    adapted: AdaptedLayer
    axes: KernelAxes
    positions: tuple[int, ...]
    dtype: Any
    module: nn.Module
    box: meta.Partitioned[None] | None = None

    def product(self, kernel: Any, base: FrozenBase) -> KernelProduct:
        """Returns how the norm multiplies with the stored kernel."""
        return self.adapted.product(self.module, kernel, self.axes, self.dtype, base)

    def boxed(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arrays of the layer by name, each in a box like the kernel's if that has one."""
        if self.box is None:
            return dict(arrays)
        entries = layer_entries(self.axes, self.box.names)
        return {name: self.box.replace(value=x, names=entries[name]) for name, x in arrays.items()}

    def kernel(self, params: Tree) -> Any:
        """Returns the layer's kernel out of the model's parameters, without its box.

        Raises:
          AdapterError: it is none any more, because another library quantised the parameters.
        """
        path = self.adapted.path
        kernel = unboxed(get_in(params, (*path, self.adapted.layout.kernel)))
        if not is_kernel(kernel):
            raise AdapterError(f"{layer_name(path)}: {quantised_since(kernel)}")
        return kernel


@dataclasses.dataclass(frozen=True, eq=False)
class DoRAModel:
    """A Linen module that reads a second collection, `dora`: the adapters.

    Made by `apply_dora`. `apply` takes the arguments of `flax.linen.Module.apply`.

    Attributes:
      module: the module as it was.
      config: the configuration it was adapted with.
      layers: the adapted layers by module path.
      base: by module path, what is kept of each frozen kernel.
      shapes: of every array of the adapter tree, by path.
      statistics: the paths, in the collection `batch_stats`, of the statistics of modules trained
        in full: an adapter without them is not whole.
    """

    module: nn.Module
    config: DoRAConfig
    layers: Mapping[Path, StoredLayer]
    base: Mapping[Path, FrozenBase]
    shapes: Mapping[Path, tuple[int, ...]]
    statistics: Sequence[Path] = ()

    @property
    def base_collection(self) -> dict[str, Any]:
        """What is kept of the frozen kernels, as a collection: nested dicts by module path.

        `apply` takes it as `dora_base`. Without that collection these arrays are constants of the
        compiled program, which cannot span several hosts.
        """
        collection: dict[str, Any] = {}
        for path, base in self.base.items():
            collection = set_in(collection, path, self.layers[path].boxed(base.arrays()))
        return collection

    def with_base(self, collection: Tree) -> DoRAModel:
        """Returns the model with other arrays for `base_collection`, such as a program's arguments.

        Raises:
          AdapterError: the collection lacks a layer; names it.
        """
        base = {
            path: FrozenBase(**unboxed(get_in(collection, path, "the collection dora_base")))
            for path in self.base
        }
        return dataclasses.replace(self, base=base)

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
          variables: the module's collections, and `dora`, the adapters. On several hosts also
            `dora_base`, the model's `base_collection`.
          *args: the module's arguments.
          rngs: keys by stream; adapter dropout is active if there is a `dropout` stream.
          method: as for `Module.apply`.
          mutable: as for `Module.apply`; `params` comes back without the adapters.
          **kwargs: the module's keyword arguments.

        Raises:
          AdapterError: `dora` is missing, or does not fit the model; names the layer. Or on several
            hosts `dora_base` is missing under `jax.jit`.
        """
        check_collections(variables)
        model = self.with_base(variables["dora_base"]) if "dora_base" in variables else self
        check_base_is_no_constant(model)
        check_adapters(model, variables["dora"])
        adapters = unboxed(variables["dora"])
        others = {k: value for k, value in variables.items() if k not in ("dora", "dora_base")}
        others["params"] = model._params_with_adapters(variables["params"], adapters)
        dropout = bool(self.config.dropout) and rngs is not None and _has_dropout(rngs)
        adapted = {path: layer.adapted for path, layer in self.layers.items()}
        with nn.intercept_methods(functools.partial(intercept, adapted, dropout)):
            result = self.module.apply(
                others, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
            )
        if mutable is False:
            return result
        output, updated = result
        return output, _without_adapters(updated)

    def _params_with_adapters(self, params: Tree, adapters: Tree) -> dict[str, Any]:
        """Returns the parameters with each layer's adapter among them.

        {"up": {"kernel": W}}  ->
        {"up": {"kernel": W, "dora": {"adapter": {"lora_a": A, ...}, "base": FrozenBase(...)}}}
        """
        result = overlay(params, saved_modules(self.layers, adapters))
        for path, layer in self.layers.items():
            layer.kernel(params)  # it may be quantised
            kept: Any = {"adapter": dict(get_in(adapters, path)), "base": self.base[path]}
            if any(layer.positions):
                place = functools.partial(
                    stack_at, positions=layer.positions, call_ndim=layer.adapted.axes.ndim
                )
                kept = jax.tree.map(place, kept)
            result = set_in(result, path, {**get_in(params, path), ADAPTER_KEY: kept})
        return result


def check_collections(variables: Tree) -> None:
    """Raises `AdapterError` unless both `params` and `dora` are among the collections."""
    if missing := {"params", "dora"} - set(variables):
        raise AdapterError(
            f"variables has no collection {min(missing)!r}: apply to {{'params': ..., 'dora': "
            "adapters}, or use the module itself to run the base"
        )


def check_base_is_no_constant(model: DoRAModel) -> None:
    """Raises `AdapterError` where a program would hold arrays of other processes as constants.

    What a model keeps of its base is no argument of a function that closes over the model. JAX
    compiles no program with such arrays if they span processes.
    """
    kept = (x for base in model.base.values() for x in base.arrays().values())
    if any(map(spans_processes, kept)) and isinstance(jnp.zeros(()), jax.core.Tracer):
        raise AdapterError(
            "the arrays that the model keeps of its base span several processes, so that a "
            "compiled function takes them as an argument: pass model.base_collection to it, and "
            "inside it variables={'params': ..., 'dora': ..., 'dora_base': that collection} to "
            "apply, or model.with_base(that collection) to other functions"
        )


def check_adapters(model: DoRAModel, adapters: Tree) -> None:
    """Raises `AdapterError` if an adapter array is missing, unknown or of a wrong shape.

    Adapters with precomputed scales in place of magnitudes fit too. Those that are known to be of
    other settings, such as another alpha, are refused.
    """
    wanted = model.shapes
    given = tree_shapes(adapters)
    if any((*path, "scale") in given for path in model.layers):
        scales = {
            (*path, "scale"): model.base[path].norm.shape
            for path, layer in model.layers.items()
            if layer.adapted.settings.decompose
        }
        magnitudes = {(*path, "magnitude") for path in model.layers}
        wanted = {p: s for p, s in wanted.items() if p not in magnitudes} | scales
    check_shapes(adapters, wanted)
    check_origin(flatten(adapters), origins(model))


def origins(model: DoRAModel) -> dict[Path, Origin]:
    """Returns what is remembered of the adapter arrays of each adapted layer, by path."""
    return {
        path: origin(layer.adapted.settings, changes_product=model.base[path].init_a is not None)
        for path, layer in model.layers.items()
    }


def remembered(model: DoRAModel, adapters: dict[str, Any]) -> dict[str, Any]:
    """Returns an adapter tree of a model, whose settings are remembered with it."""
    remember(flatten(adapters), origins(model))
    return adapters


def check_base(model: DoRAModel, params: Tree) -> None:
    """Raises `AdapterError` if a kernel is not the one its adapter was made for, naming the layer.

    An adapted layer whose kernel was exchanged gives NaN, and merges to NaN; this says which,
    except under a transformation such as `jax.jit`, where the values are not known.
    """
    check_base_is_no_constant(model)
    check_byte_order(params)
    for path, layer in model.layers.items():
        check_kernel(path, layer.kernel(params), model.base[path], layer.axes)


def check_byte_order(params: Tree) -> None:
    """Raises `AdapterError` if an array is in a byte order that JAX does not read, naming it."""
    for path, x in flatten(params).items():
        if native(x) is not x:
            raise AdapterError(
                f"{'.'.join(path)} is in a byte order that JAX does not read ({x.dtype.str}): "
                'convert it with x.astype(x.dtype.newbyteorder("="))'
            )


def saved_modules(layers: Iterable[Path], adapters: Tree) -> Tree:
    """Returns the part of an adapter tree that belongs to modules trained in full."""
    for path in layers:
        adapters = set_in(adapters, path, {})
    return adapters


def _has_dropout(rngs: Any) -> bool:
    """Whether `rngs` has a stream for dropout; a single key serves every stream."""
    return not isinstance(rngs, Mapping) or "dropout" in rngs


def _without_adapters(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {k: _without_adapters(v) for k, v in tree.items() if k != ADAPTER_KEY}
