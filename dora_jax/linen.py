"""DoRA for Flax Linen: a method interceptor around `Module.apply`.

The adapters travel inside `params` beside the kernels they adapt, so that whatever the model does
with its own parameters (`nn.scan`, `nn.vmap`, `nn.remat`, `nn.share_scope`) it does with them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from dora_jax.adapters import (
    check_index,
    check_shapes,
    disable,
    select_adapters,
    tree_shapes,
    warn_of_rounding,
)
from dora_jax.config import (
    AdapterError,
    AdapterSpec,
    ConfigError,
    DoRAConfig,
    Path,
    check_indices,
    layer_name,
    match_modules,
    select_layers,
)
from dora_jax.decomposition import (
    KernelAxes,
    base_changed,
    describe_base,
    merge_kernel,
    scale_minus_one,
)
from dora_jax.initializers import init_layer, transforms
from dora_jax.layer_types import DENSE
from dora_jax.linen_layers import BESIDE, AdaptedLayer, intercept
from dora_jax.linen_trace import stored_kernel_axes, trace_layers
from dora_jax.stack_axes import is_in_front, stack_at
from dora_jax.trees import Tree, get_in, overlay, set_in


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
        _check_collections(variables)
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
        result = overlay(params, _saved(self.layers, adapters))
        for path in self.layers:
            layer = self.layers[path]
            base = {f"base_{k}": v for k, v in self.base[path].items()}
            beside = {**get_in(adapters, path), **base}
            if any(layer.positions):
                ndim = layer.call_axes.ndim
                beside = {k: stack_at(v, layer.positions, ndim) for k, v in beside.items()}
            result = set_in(result, path, {**get_in(params, path), BESIDE: beside})
        return result


def apply_dora(
    module: nn.Module | DoRAModel,
    config: DoRAConfig,
    *,
    params: Tree,
    rng: jax.Array,
    inputs: Sequence[Any],
    variables: Tree | None = None,
    method: Callable[..., Any] | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[DoRAModel, dict[str, Any]]:
    """Returns an adapted model and its adapters, for a Linen module and its parameters.

    Nothing is changed in `module` or `params`. At this point both models compute the same, bit for
    bit.

    Args:
      module: any `flax.linen.Module`.
      config: which layers, and how.
      params: the module's `params` collection (not the dict around it).
      rng: draws `lora_a`.
      inputs: arguments of a call, arrays or `jax.ShapeDtypeStruct`: the call is traced, not run, to
        see which layers there are.
      variables: further collections that the call reads, such as `batch_stats`.
      method: the method to trace, if not `__call__`.
      kwargs: keyword arguments of the call.

    Returns:
      The model, for `model.apply({"params": params, "dora": adapters}, *inputs)`, and the adapter
      tree: nested dicts by module path.

    Raises:
      AdapterError: the module is adapted already, or the call does not use its parameters.
      ConfigError: a pattern matches nothing, or a rank is too high; names the layer.
      LayoutError: a named layer is of a class whose layout is not known.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> jax.tree.map(jnp.shape, adapters)
      {'lora_a': (4, 2), 'lora_b': (2, 3), 'magnitude': (3,)}
      >>> y = model.apply({"params": params, "dora": adapters}, x)
      >>> bool((y == module.apply({"params": params}, x)).all())
      True
    """
    if isinstance(module, DoRAModel):
        raise AdapterError("the module is adapted already: merge it first")
    if "params" in params:
        raise ConfigError("params must be the collection itself: pass variables['params']")
    trace = functools.partial(
        trace_layers, module, params, inputs, variables or {}, method, kwargs or {}
    )
    found, modules = trace()
    specs = select_layers(
        config,
        {path: layer.layout.all_linear for path, layer in found.items()},
        modules,
        {path: refusal for path, refusal in modules.items() if refusal},
    )
    kernels = {p: meta.unbox(get_in(params, (*p, found[p].layout.kernel))) for p in specs}
    unclear = [p for p in specs if not is_in_front(kernels[p].shape, found[p].kernel_shape)]
    if unclear:
        found, _ = trace([(*path, found[path].layout.kernel) for path in unclear])
    layers, base = {}, {}
    adapters: dict[str, Any] = {}
    for path, spec in specs.items():
        layout, kernel = found[path].layout, kernels[path]
        positions, axes = stored_kernel_axes(path, found[path], kernel.shape)
        if not transforms(spec, axes):
            continue
        adapter, base[path] = init_layer(config, spec, path, rng, kernel, axes)
        adapters = set_in(adapters, path, adapter)
        traced = found[path]
        layers[path] = AdaptedLayer(
            spec,
            layout,
            axes,
            traced.axes,
            positions,
            traced.dtype,
            traced.precision,
            traced.module,
        )
    check_indices(config, {path: layer.spec for path, layer in layers.items()})
    for path in _saved_paths(config, modules):
        adapters = set_in(adapters, path, meta.unbox(get_in(params, path)))
    return DoRAModel(module, config, layers, base, tree_shapes(adapters)), adapters


def merge(params: Tree, adapters: Tree, config: DoRAConfig | DoRAModel) -> dict[str, Any]:
    """Returns plain parameters with the merged kernels, of the structure of `params`.

    Args:
      params: the base's `params` collection.
      adapters: the adapter tree.
      config: the configuration, if every adapted kernel's axes are (stack, in, out); the adapted
        model serves every layout.

    Raises:
      AdapterError: an adapter has no kernel in `params`, its shapes do not fit, or an array that
        `config` asks for is missing; names the layer.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away; says how much.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> config = dora.DoRAConfig(rank=2)
      >>> model, adapters = dora.apply_dora(
      ...     module, config, params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> bool((merge(params, adapters, config)["kernel"] == params["kernel"]).all())
      True
    """
    if isinstance(config, DoRAModel):
        check_adapters(config, adapters)
        check_base(config, params)
        layers = config.layers
    else:
        layers = _layers_from_shapes(params, adapters, config)
        _check_saved(config, _saved(layers, adapters))
    merged: Tree = params
    lost = {}
    for path, layer in layers.items():
        spec, layout, axes = layer.spec, layer.layout, layer.axes
        own = get_in(params, path)
        kernel = meta.unbox(own[layout.kernel])
        if isinstance(config, DoRAModel):
            base = config.base[path]
        else:
            base = _describe_base(kernel, axes, spec.eps)
        new, lost[path] = merge_kernel(spec, kernel, get_in(adapters, path), base, axes)
        new = meta.replace_boxed(own[layout.kernel], new)
        merged = set_in(merged, path, {**own, layout.kernel: new})
    warn_of_rounding(lost)
    return overlay(merged, _saved(layers, adapters))


def hoist(model: DoRAModel, params: Tree, adapters: Tree) -> dict[str, Any]:
    """Returns an adapter tree that holds each layer's scale, computed once, here.

    `model.apply` takes it as it takes `adapters`. The scale depends on parameters alone: inside a
    loss, hoist before a loop over microbatches, and the norm is evaluated, and differentiated, once
    for all of them. For inference, hoisting freezes the scale: a call costs what LoRA's does.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> hoist(model, params, adapters)["scale"]
      Array([0., 0., 0.], dtype=float32)
    """
    check_adapters(model, adapters)
    hoisted: Any = adapters
    for path, layer in model.layers.items():
        if not layer.spec.decompose:
            continue
        adapter = dict(get_in(adapters, path))
        scale = scale_minus_one(
            layer.spec,
            meta.unbox(get_in(params, (*path, layer.layout.kernel))),
            adapter,
            model.base[path],
            layer.axes,
            dtype=layer.dtype,
            precision=layer.precision,
        )
        adapter.pop("magnitude", None)
        hoisted = set_in(hoisted, path, {**adapter, "scale": scale})
    return hoisted


def disabled_adapters(model: DoRAModel, adapters: Tree) -> dict[str, Any]:
    """Returns the adapter tree with which the model computes what its base computes.

    It has the structure of `adapters`, so that switching between them compiles nothing anew.
    Modules trained in full stay as they are.
    """
    return disable(adapters, model.base)


def apply_mixed(model: DoRAModel, variables: Tree, index: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Applies a model to a batch in which every example has an adapter of its own.

    The outputs are those of one call for each adapter. Give hoisted adapters, so that norms are not
    computed for each example.

    Args:
      model: the adapted model.
      variables: its collections; the leaves of `dora` are stacked `(adapters, ...)`, as from
        `dora_jax.stack_adapters`.
      index: which of the adapters each example uses, int `(batch,)`.
      *inputs: arrays with a leading batch axis.
      **kwargs: further arguments, the same for every example.

    Raises:
      AdapterError: the adapters do not fit, or an example has no index.

    Example:
      >>> import dora_jax as dora, jax.numpy as jnp
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), params=params, rng=jax.random.key(1), inputs=(x,)
      ... )
      >>> both = dora.stack_adapters([adapters, dora.disabled_adapters(model, adapters)])
      >>> apply_mixed(model, {"params": params, "dora": both}, jnp.array([0, 1, 1, 0, 1]), x).shape
      (5, 3)
    """
    _check_collections(variables)
    check_index(index, inputs)
    others = {name: value for name, value in variables.items() if name != "dora"}

    def one(adapters: Tree, *example: Any) -> Any:
        examples = (x[None] for x in example)
        output = model.apply({**others, "dora": adapters}, *examples, **kwargs)
        return jax.tree.map(lambda y: y[0], output)

    return jax.vmap(one)(select_adapters(variables["dora"], index), *inputs)


def _check_collections(variables: Tree) -> None:
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
            if layer.spec.decompose
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


_describe_base = jax.jit(describe_base, static_argnums=(1, 2))


def _has_dropout(rngs: Any) -> bool:
    """Whether `rngs` has a stream for dropout; a single key serves every stream."""
    return not isinstance(rngs, Mapping) or "dropout" in rngs


def _saved_paths(config: DoRAConfig, modules: Iterable[Path]) -> list[Path]:
    by_name = {".".join(path): path for path in modules}
    saved = match_modules(config.modules_to_save, by_name, "modules_to_save")
    return [by_name[name] for name in sorted(saved)]


def _saved(layers: Iterable[Path], adapters: Tree) -> Tree:
    """Returns the part of an adapter tree that is of modules trained in full."""
    for path in layers:
        adapters = set_in(adapters, path, {})
    return adapters


def _check_saved(config: DoRAConfig, saved: Tree) -> None:
    leaves = tree_shapes(saved)
    modules = {".".join(path[:i]) for path in leaves for i in range(1, len(path))}
    try:
        match_modules(config.modules_to_save, modules, "modules_to_save")
    except ConfigError as error:
        raise AdapterError(f"the adapters lack a module trained in full: {error}") from error


def _layers_from_shapes(
    params: Tree, adapters: Tree, config: DoRAConfig
) -> dict[Path, AdaptedLayer]:
    """Returns the adapted layers of a tree whose kernels are laid out as (stack, in, out)."""
    layers = {}
    for path in _adapter_paths(adapters):
        adapter, spec = get_in(adapters, path), config.spec(path)
        if config.changes_product or spec.indices is not None:
            raise AdapterError(
                f"{layer_name(path)}: init={config.init!r} and layers_to_transform need what was "
                "kept of the base: pass the adapted model in place of the configuration"
            )
        _check_names(path, spec, adapter)
        own = get_in(params, path)
        if "kernel" not in own:
            raise AdapterError(
                f"{layer_name(path)}: there is an adapter, but no 'kernel' among its parameters"
            )
        axes = _axes_from_shapes(path, np.shape(meta.unbox(own["kernel"])), adapter)
        layers[path] = AdaptedLayer(spec, DENSE, axes, axes)
    return layers


def _adapter_paths(adapters: Tree, path: Path = ()) -> list[Path]:
    if {"lora_a", "lora_b", "magnitude"} & set(adapters):
        return [path]
    inner = ((k, v) for k, v in adapters.items() if isinstance(v, Mapping))
    return [found for k, v in inner for found in _adapter_paths(v, (*path, k))]


def _check_names(path: Path, spec: AdapterSpec, adapter: Tree) -> None:
    wanted, given = set(spec.parameter_names), set(adapter)
    if wanted != given:
        raise AdapterError(
            f"{layer_name(path)}: the configuration asks for {sorted(wanted)}, the "
            f"adapter has {sorted(given)}"
        )


def _axes_from_shapes(path: Path, kernel: tuple[int, ...], adapter: Tree) -> KernelAxes:
    """Returns the axes of a kernel laid out as (stack, in, out), from its adapter's shapes.

    A magnitude alone does not tell stack from out axes: it is taken for a dense kernel's.
    """
    ndim, outputs, inputs = len(kernel), 1, 1
    if "lora_a" in adapter:
        a, b = (np.ndim(adapter[name]) for name in ("lora_a", "lora_b"))
        inputs, outputs = ndim - b + 1, ndim - a + 1
    stack, order = ndim - inputs - outputs, tuple(range(ndim))
    rank = np.shape(adapter["lora_a"])[-1] if "lora_a" in adapter else 0
    if min(stack, inputs, outputs) >= 0:
        axes = KernelAxes(order[:stack], order[stack : stack + inputs], order[stack + inputs :])
        expected = axes.shapes(kernel, rank)
        if all(np.shape(value) == expected[name] for name, value in adapter.items()):
            return axes
    shapes = {name: np.shape(value) for name, value in adapter.items()}
    raise AdapterError(
        f"{layer_name(path)}: the adapter {shapes} does not fit the kernel {kernel} laid out as "
        "(stack, in, out); check the base, or pass the adapted model in place of the configuration"
    )


def _without_adapters(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {k: _without_adapters(v) for k, v in tree.items() if k != BESIDE}
