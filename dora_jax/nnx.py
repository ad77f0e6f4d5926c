"""DoRA for Flax NNX: layers that carry their adapter.

An adapted layer is the same object of a subclass of its class, so that the paths and attributes of
the base model, and the base checkpoints made for them, stay valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax.adapted_call import compute_dtype
from dora_jax.adapters import (
    check_index,
    check_shapes,
    disable,
    flatten,
    select_adapters,
    tree_shapes,
    warn_of_rounding,
)
from dora_jax.config import (
    AdapterError,
    DoRAConfig,
    Path,
    check_indices,
    layer_name,
    match_modules,
    select_layers,
)
from dora_jax.decomposition import base_changed, merge_kernel, scale_minus_one
from dora_jax.initializers import init_layer, transforms
from dora_jax.layouts import Layout, find_layout, stored_axes
from dora_jax.nnx_layers import (
    OWN_ATTRIBUTES,
    BaseParam,
    DoRALayer,
    DoRAParam,
    SavedParam,
    adapter_of,
    base_of,
    become,
    dora_class,
    kernel_and_axes,
    named_modules,
    plain_class,
)
from dora_jax.nnx_trace import (
    call_axes_of,
    check_stored_shape,
    find_refusals,
    trace_axes,
    warn_of_uncalled,
)

M = TypeVar("M", bound=nnx.Module)


def apply_dora(
    model: M, config: DoRAConfig, *, rngs: nnx.Rngs, inputs: Sequence[Any] | None = None
) -> M:
    """Returns a copy of an NNX model whose selected layers carry a DoRA adapter.

    The copy shares its arrays with `model`, which stays as it is. At this point both compute the
    same, bit for bit.

    Args:
      model: any `nnx.Module`; its arrays may be abstract (`nnx.eval_shape`).
      config: which layers, and how.
      rngs: draws `lora_a` (stream `params`), and serves the adapters' dropout.
      inputs: arguments of a call of the model, arrays or `jax.ShapeDtypeStruct`; it is traced, not
        run. Needed for layers whose equation is given with each call, and to find that a tied head
        reads an embedding that is adapted.

    Raises:
      TypeError: `rngs` is a key.
      AdapterError: the model is adapted already.
      ConfigError: a pattern matches nothing, or a rank is too high; names the layer.
      LayoutError: a named layer is of a class whose layout is not known.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> x = jnp.ones((5, 4))
      >>> bool((adapted(x) == model(x)).all()), adapted.magnitude.shape
      (True, (3,))
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be an nnx.Rngs, as in rngs=nnx.Rngs(0), got {type(rngs)}")
    if adapted := [path for path, _ in adapted_layers(model)]:
        raise AdapterError(
            f"the model is adapted already ({layer_name(adapted[0])} has an adapter); merge it "
            "first"
        )
    model = _copy(model)
    modules = dict(named_modules(model))
    layers: dict[Path, tuple[Any, Layout]] = {
        path: (module, layout)
        for path, module in modules.items()
        if (layout := find_layout(type(module))) is not None
    }
    specs = select_layers(
        config,
        {path: layout.all_linear for path, (_, layout) in layers.items()},
        modules,
        find_refusals(modules, layers),
    )
    layers = {path: layers[path] for path in specs}
    traced = {} if inputs is None else trace_axes(model, layers, tuple(inputs))
    if inputs is not None:
        warn_of_uncalled(layers.keys() - traced.keys())
    key = rngs.params()
    for path, spec in specs.items():
        layer, layout = layers[path]
        kernel = getattr(layer, layout.kernel).get_value()
        call_axes = traced[path] if path in traced else call_axes_of(path, layer, layout, {})
        axes = stored_axes(call_axes, kernel.ndim, layer_name(path))
        check_stored_shape(path, layer, kernel)
        if not transforms(spec, axes):
            continue
        adapter, base = init_layer(config, spec, path, key, kernel, axes)
        become(layer, dora_class(layer.__class__))
        layer.spec, layer.call_axes = spec, call_axes
        layer.layer_path = tuple(key for key in path if not key.isdigit())
        layer.lora_dropout = nnx.Dropout(spec.dropout)
        if spec.dropout:  # a scan or vmap over the layer needs a key for each slice of its stack
            stream, stack = rngs.dropout, tuple(kernel.shape[i] for i in axes.stack)
            keys = jax.random.split(stream(), stack)
            layer.lora_dropout.rngs = type(stream)(keys, tag=stream.tag)
        for name, value in adapter.items():
            setattr(layer, name, DoRAParam(value))
        for name, value in base.items():
            setattr(layer, f"base_{name}", BaseParam(value))
    check_indices(config, {path: layer.spec for path, layer in adapted_layers(model)})
    for path in _saved_paths(config, modules):
        _retype_parameters(modules[path], nnx.Param, SavedParam)
    return model


def merge(model: M) -> M:
    """Returns a copy of an adapted model with plain layers whose kernels are the merged ones.

    The adapted model stays as it is: keep it, or the base, to have the adapter apart again.

    Raises:
      AdapterError: nothing is adapted, or a base kernel changed since `apply_dora`.

    Warns:
      UserWarning: kernels of a narrow dtype round some of the change away; says how much.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> type(merge(adapted)).__name__
      'Linear'
    """
    check_base(model)
    model = _copy(model)
    lost = {}
    for path, layer in list(adapted_layers(model)):
        kernel, axes = kernel_and_axes(layer)
        spec = layer.spec
        kernel[...], lost[path] = merge_kernel(
            spec, kernel[...], adapter_of(layer), base_of(layer), axes
        )
        base_names = [f"base_{name}" for name in base_of(layer)]
        for name in (*spec.parameter_names, *base_names, *OWN_ATTRIBUTES):
            delattr(layer, name)
        become(layer, plain_class(type(layer)))
    _retype_parameters(model, SavedParam, nnx.Param)
    warn_of_rounding(lost)
    return model


def hoist(model: M) -> M:
    """Returns a copy of an adapted model whose layers hold their scale, computed once, here.

    The scale depends on parameters alone. Inside a loss, hoist before a loop over microbatches: the
    norm is then evaluated, and differentiated, once for all of them. For inference, hoisting
    freezes the scale: a call costs what LoRA's does.

    Raises:
      AdapterError: nothing is adapted.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> hoist(adapted).scale[...]
      Array([0., 0., 0.], dtype=float32)
    """
    model = _copy(model)
    for layer in _checked_layers(model):
        spec = layer.spec
        if not spec.decompose or spec.hoisted:
            continue
        kernel, axes = kernel_and_axes(layer)
        value = kernel[...]
        scale = scale_minus_one(
            spec,
            value,
            adapter_of(layer),
            base_of(layer),
            axes,
            dtype=compute_dtype(layer, value, value),
            precision=getattr(layer, "precision", None),
        )
        if spec.has_magnitude:
            delattr(layer, "magnitude")
        layer.scale = DoRAParam(scale)
        layer.spec = dataclasses.replace(spec, hoisted=True)
    return model


def disabled_adapters(model: nnx.Module) -> dict[str, Any]:
    """Returns the adapter tree with which an adapted model computes what its base computes.

    `set_adapters` switches to it and back; nothing is compiled anew. Modules trained in full stay
    as they are.
    """
    _checked_layers(model)
    tree = get_adapters(model)
    return disable(tree, {path: base_of(layer) for path, layer in adapted_layers(model)})


def apply_mixed(model: nnx.Module, stacked: Any, index: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Applies an adapted model to a batch in which every example has an adapter of its own.

    The outputs are those of one call for each adapter. Give adapters of a hoisted model, so that
    norms are not computed for each example.

    Args:
      model: the adapted model, as `hoist` returns it or not.
      stacked: adapter trees of that model, from `dora_jax.stack_adapters`, with leaves
        `(adapters, ...)`.
      index: which of them each example uses, int `(batch,)`.
      *inputs: arrays with a leading batch axis.
      **kwargs: further arguments, the same for every example.

    Raises:
      AdapterError: nothing is adapted, the adapters do not fit, or an example has no index.

    Example:
      >>> import dora_jax as dora
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> model = dora.hoist(dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1)))
      >>> both = dora.stack_adapters([dora.get_adapters(model), dora.disabled_adapters(model)])
      >>> apply_mixed(model, both, jnp.array([0, 1, 0]), jnp.ones((3, 4))).shape
      (3, 3)
    """
    _checked_layers(model)
    check_index(index, inputs)
    check_shapes(jax.tree.map(lambda x: x[0], stacked), tree_shapes(get_adapters(model)))
    graphdef, state = nnx.split(model)

    def one(tree: Any, *example: Any) -> Any:
        own = nnx.merge(graphdef, state, copy=True)
        set_adapters(own, tree)
        return jax.tree.map(lambda y: y[0], own(*(x[None] for x in example), **kwargs))

    return jax.vmap(one)(select_adapters(stacked, index), *inputs)


def check_base(model: nnx.Module) -> None:
    """Raises `AdapterError` if a kernel is not the one its adapter was made for, naming the layer.

    An adapted layer whose kernel was exchanged gives NaN, and merges to NaN; this says which,
    except under a transformation such as `jax.jit`, where the values are not known.
    """
    _checked_layers(model)
    for path, layer in adapted_layers(model):
        kernel, axes = kernel_and_axes(layer)
        changed = base_changed(kernel[...], base_of(layer), axes)
        if not isinstance(changed, jax.core.Tracer) and np.any(changed):
            raise AdapterError(
                f"{layer_name(path)}: the kernel changed since apply_dora, so its stored norm is "
                "wrong. Load the base first, then adapt it"
            )


def get_adapters(model: nnx.Module) -> dict[str, Any]:
    """Returns the adapter tree: nested dicts by module path, of everything that DoRA trains.

    Example:
      >>> import dora_jax as dora
      >>> mlp = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> mlp = dora.apply_dora(mlp, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> jax.tree.map(jnp.shape, get_adapters(mlp))
      {'layers': {'0': {'lora_a': (4, 2), 'lora_b': (2, 3), 'magnitude': (3,)}}}
    """
    return _string_keys(nnx.to_pure_dict(nnx.state(model, DoRAParam)))


def set_adapters(model: nnx.Module, adapters: Mapping[str, Any]) -> None:
    """Puts an adapter tree, as `get_adapters` returns it, into an adapted model.

    Raises:
      AdapterError: names, shapes or the presence of a magnitude differ; names each.
    """
    if adapters:
        _checked_layers(model)
    state = nnx.state(model, DoRAParam)
    wanted = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    check_shapes(adapters, {path: variable.shape for path, variable in wanted.items()})
    given = flatten(adapters)
    for path, variable in wanted.items():
        variable[...] = jnp.asarray(given[path], variable.dtype)
    nnx.update(model, state)


def _copy(model: M) -> M:
    return nnx.merge(*nnx.split(model), copy=True)  # new variables, the same arrays


def adapted_layers(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """Returns the layers that carry an adapter, by path; a shared one once."""
    return ((path, m) for path, m in named_modules(model) if isinstance(m, DoRALayer))


def _checked_layers(model: nnx.Module) -> list[Any]:
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers and not jax.tree.leaves(nnx.state(model, DoRAParam)):
        raise AdapterError("the model has no adapter: apply_dora first; a merged one has none left")
    return layers


def _saved_paths(config: DoRAConfig, modules: Mapping[Path, Any]) -> list[Path]:
    by_name = {".".join(path): path for path in modules}
    saved = match_modules(config.modules_to_save, by_name, "modules_to_save")
    return [by_name[name] for name in sorted(saved)]


def _retype_parameters(module: nnx.Module, old: type, new: type) -> None:
    """Changes the type of every variable of exactly type `old` inside a module, in place."""
    for _, node in nnx.iter_graph(module):
        if type(node) is old:
            object.__setattr__(node, "__class__", new)


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree
