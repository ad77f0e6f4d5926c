"""PEFT adapter folders to adapted Flax models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import jax
import numpy as np
from flax import linen, nnx

from dora_jax.adapters.origin import origin, remember
from dora_jax.adapters.trees import Tree, check_shapes, flatten, nest
from dora_jax.config import DoRAConfig, TrainedConfig
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.model import (
    Plain,
    adapt,
    adapt_abstract,
    adapter_shapes,
    base_parameters,
    is_adapted,
    with_adapter_arrays,
)
from dora_jax.names.name_map import NameMap
from dora_jax.peft import folder as files
from dora_jax.peft.config import PeftError
from dora_jax.peft.keys import ModuleTensors, group_tensors
from dora_jax.peft.layers import Layer, adapted_layers, check_tied, from_tensors, hf_modules
from dora_jax.peft.matching import check_modules, saved_parameters
from dora_jax.peft.settings import dora_config

if TYPE_CHECKING:
    from dora_jax.api.adapted import DoRAModel, ExampleCall, M


@overload
def load_pretrained(
    model: M,
    folder: files.Folder,
    names: NameMap,
    *,
    unused: Sequence[str] = (),
    rngs: nnx.Rngs | None = None,
    inputs: Sequence[Any] | None = None,
) -> M: ...


@overload
def load_pretrained(
    model: linen.Module,
    folder: files.Folder,
    names: NameMap,
    *,
    params: Tree,
    inputs: Sequence[Any] | ExampleCall,
    unused: Sequence[str] = (),
    rngs: jax.Array | None = None,
) -> tuple[DoRAModel, dict[str, Any]]: ...


def load_pretrained(
    model: Any,
    folder: files.Folder,
    names: NameMap,
    *,
    unused: Sequence[str] = (),
    rngs: Any = None,
    params: Any = None,
    inputs: Any = None,
) -> Any:
    """Returns a model adapted with the adapter of a PEFT folder.

    It computes the same outputs as PEFT in the same mode: an NNX model keeps its own, train or
    eval. If none of its layers knows its mode, adapter dropout does not act until `train()` is
    called. As in PEFT, no gradient flows through the norm. Adapters are
    float32, whatever the file's dtype; float64 if the file is.

    Args:
      model: an NNX model or a Linen module, not adapted. It stays as it is.
      folder: holds `adapter_config.json` and `adapter_model.safetensors`. Of several adapters, PEFT
        saves all but the one named "default" in folders inside.
      names: which Hugging Face module each module of the model is, such as `dora_jax.names.LLAMA`.
      unused: Hugging Face modules that the model does without. Their adapters are left out.
      rngs: as for `apply_dora`, a key for Linen. Serves the adapters' dropout. Need not be given.
      params: of a Linen module.
      inputs: arguments of an example call, as for `apply_dora`. Needed for Linen.

    Returns:
      The adapted NNX model; for Linen the `DoRAModel` and the adapter tree.

    Raises:
      PeftError: a file is damaged or not PEFT's, a setting is not implemented, or the adapter is of
        another model; names the file, field or tensor, and the fix.
      AdapterError: the model is adapted already.

    Example:
      >>> import tempfile, dora_jax as dora
      >>> from dora_jax.names import IDENTITY
      >>> from dora_jax.peft import save_pretrained
      >>> base = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> model = dora.apply_dora(base, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_pretrained(model, folder, IDENTITY)
      ...     again = load_pretrained(base, folder, IDENTITY)
      >>> dora.adapters.diff(dora.get_adapters(model), dora.get_adapters(again))["layers.0.lora_a"]
      0.0
    """
    if is_adapted(model):
        raise AdapterError("the model is adapted already: merge it first, or use read_adapters")
    tree, config = read_adapters(model, folder, names, unused=unused, params=params, inputs=inputs)
    return adapt_with(model, tree, config, Plain(rngs, params, inputs))


@overload
def read_adapters(
    model: nnx.Module,
    folder: files.Folder,
    names: NameMap,
    *,
    unused: Sequence[str] = (),
    inputs: Sequence[Any] | None = None,
) -> tuple[dict[str, Any], DoRAConfig]: ...


@overload
def read_adapters(
    model: linen.Module | DoRAModel,
    folder: files.Folder,
    names: NameMap,
    *,
    params: Tree,
    unused: Sequence[str] = (),
    inputs: Sequence[Any] | ExampleCall | None = None,
) -> tuple[dict[str, Any], DoRAConfig]: ...


def read_adapters(
    model: Any,
    folder: files.Folder,
    names: NameMap,
    *,
    unused: Sequence[str] = (),
    params: Any = None,
    inputs: Any = None,
) -> tuple[dict[str, Any], DoRAConfig]:
    """Returns the adapter tree and the configuration of a PEFT adapter folder.

    Arguments are those of `load_pretrained`. The model's arrays may be abstract. It may be adapted
    already, with the configuration of the folder: so one model switches between adapters.

    Returns:
      The tree, of NumPy arrays in the dtypes of the file, and the configuration.

    Raises:
      PeftError: see `load_pretrained`.
      AdapterError: the model is adapted with other settings than the folder's; names them.
    """
    was_adapted = is_adapted(model)
    config, tensors = files.read(folder)
    try:
        adapters, others = group_tensors(config, tensors, unused)
    except PeftError as error:
        raise PeftError(f"{folder}: {error}") from error
    parameters = base_parameters(model, params)
    modules = hf_modules(parameters, names)
    check_modules(config, adapters, modules)
    saved = saved_parameters(config, others, parameters, names, modules)
    wanted = dora_config(config, adapters, saved, modules)
    adapted = model
    if not was_adapted:
        # Only its shapes are used, so the dtype does not matter.
        narrow = dataclasses.replace(wanted, adapter_dtype="float32")
        adapted = adapt_abstract(model, narrow, Plain(params=params, inputs=inputs))
    layers = adapted_layers(adapted, names)
    _check_layers(layers, wanted, adapters, was_adapted)
    check_tied(layers.values(), names, parameters)
    arrays = {path: from_tensors(layer, adapters) for path, layer in layers.items()}
    read = {(*path, name): x for path, own in arrays.items() for name, x in own.items()}
    tree = nest(saved | read)
    check_shapes(tree, adapter_shapes(adapted))
    origins = {p: origin(wanted.layer_settings(p), changes_product=False) for p in layers}
    remember(flatten(tree), origins)
    return tree, TrainedConfig.of(wanted)


def adapt_with(model: Any, adapters: Tree, config: DoRAConfig, plain: Plain) -> Any:
    """Returns a plain model adapted with an adapter tree, as `load_pretrained` does.

    Raises:
      PeftError: the adapters are float64, which JAX does not have unless it is enabled.
    """
    if config.adapter_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise PeftError(
            "the adapter is in float64, which JAX has only after jax.config.update("
            "'jax_enable_x64', True). Without it, cast the tree that read_adapters returns"
        )
    adapted, own = adapt(model, config, plain)
    dtypes = {path: x.dtype for path, x in flatten(own).items()}
    cast = {path: np.asarray(x).astype(dtypes[path]) for path, x in flatten(adapters).items()}
    return with_adapter_arrays(adapted, own, cast)


def _check_layers(
    layers: Mapping[Path, Layer],
    config: DoRAConfig,
    adapters: Mapping[str, ModuleTensors],
    was_adapted: bool,
) -> None:
    """Raises `DoRAError` unless the model's adapted layers and settings are those of the file."""
    given = {name for layer in layers.values() for name, _ in layer.slices()}
    problems = [
        f"{name} has an adapter in the {'model' if name in given else 'file'} alone"
        for name in sorted(given ^ adapters.keys())
    ]
    for path, layer in layers.items():
        own, wanted = layer.settings, config.layer_settings(path)
        problems += [
            f"{layer_name(path)} has {field} {getattr(own, field)} in the model, "
            f"{getattr(wanted, field)} in the file"
            for field in ("rank", "scaling", "decompose")
            if getattr(own, field) != getattr(wanted, field)
        ]
    if problems and was_adapted:
        listing = "; ".join(problems)
        raise AdapterError(f"the model is adapted in another way: {listing}. Use load_pretrained")
    if problems:
        raise PeftError(
            f"layers_to_transform cannot select the file's layers: {'; '.join(problems)}. Read it "
            "into a model whose layers are not stacked"
        )
