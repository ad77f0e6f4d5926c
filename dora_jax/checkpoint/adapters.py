"""Adapters on disk, in Orbax's format, with their configuration and their base's fingerprint.

The base itself is not written. `load` adapts the base again, then sets the saved arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from dora_jax.adapters.trees import Tree, check_shapes, flatten, nest, tree_shapes
from dora_jax.checkpoint.checks import check_settings, check_start_of_others
from dora_jax.checkpoint.contents import contents, trained
from dora_jax.checkpoint.fingerprint import check_same_base
from dora_jax.checkpoint.saved import SavedAdapters, read_adapters, read_config
from dora_jax.checkpoint.statistics import check_statistics_given, statistics_to_load
from dora_jax.checkpoint.storage import write
from dora_jax.config import DoRAConfig
from dora_jax.errors import CheckpointError, Path
from dora_jax.model import (
    STATISTICS,
    Plain,
    adapt,
    carries_arrays,
    layer_settings,
    set_mutable_arrays,
    with_adapter_arrays,
    with_base_records,
)
from dora_jax.selection import match_modules

if TYPE_CHECKING:
    import jax
    from flax import linen, nnx

    from dora_jax.checkpoint.saved import Folder
    from dora_jax.linen import DoRAModel, ExampleCall
    from dora_jax.nnx.variables import M


@overload
def save(
    path: Folder, model: nnx.Module, config: DoRAConfig, /, *, overwrite: bool = False
) -> None: ...


@overload
def save(
    path: Folder,
    model: DoRAModel,
    adapters: Tree,
    /,
    *,
    overwrite: bool = False,
    statistics: Tree | None = None,
) -> None: ...


@overload
def save(
    path: Folder, config: DoRAConfig, adapters: Tree, /, *, overwrite: bool = False
) -> None: ...


def save(
    path: Folder,
    model: Any,
    content: Any,
    /,
    *,
    overwrite: bool = False,
    statistics: Tree | None = None,
) -> None:
    """Saves adapters with their configuration, checksums, and the fingerprint of their base.

        save(path, model, config)      an adapted NNX model, and its configuration
        save(path, model, adapters)    the DoRAModel of a Linen model, and its adapters
        save(path, config, adapters)   an adapter tree alone: `load` cannot check the base

    The folder is complete at any moment, or not there: with `overwrite` the new version takes the
    place of the old one in one step, and several processes may save and load at once. The base is
    not saved, apart from batch statistics, such as running means, which training moves.

    Args:
      path: the folder to make.
      model: see above.
      content: see above.
      overwrite: replace adapters that are in the folder.
      statistics: of a Linen model, its collection `batch_stats`. Needed where `modules_to_save` has
        a module with such; an NNX model carries its own.

    Raises:
      AdapterError: the adapters do not fit the configuration, hold precomputed scales, are not
        finite, or lack batch statistics; names them.
      CheckpointError: the folder exists, or is the current one, or the disk is full.
      TypeError: statistics are given for anything but a Linen model.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import dora_jax as dora
      >>> base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> config = dora.DoRAConfig(rank=2)
      >>> model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/adapter", model, config)
      ...     loaded = load(f"{folder}/adapter", base)
      >>> bool((loaded.lora_a[...] == model.lora_a[...]).all())
      True
    """
    own, given = trained(model, content), flatten(statistics or {})
    if given and (own.model is None or carries_arrays(own.model)):
        raise TypeError(
            "statistics are of a Linen model, with its DoRAModel: an NNX model has them"
        )
    check_statistics_given(own.model, given, "pass statistics=variables['batch_stats']")
    write(path, *contents(own, given), overwrite=overwrite)


@overload
def load(
    path: Folder,
    model: M,
    *,
    only: Sequence[str] | None = None,
    allow_base_mismatch: bool = False,
    rngs: nnx.Rngs | None = None,
    inputs: Sequence[Any] | None = None,
) -> M: ...


@overload
def load(
    path: Folder,
    model: linen.Module | DoRAModel,
    *,
    only: Sequence[str] | None = None,
    allow_base_mismatch: bool = False,
    rngs: jax.Array | None = None,
    params: Tree | None = None,
    inputs: Sequence[Any] | ExampleCall | None = None,
) -> tuple[DoRAModel, dict[str, Any]]: ...


def load(
    path: Folder,
    model: Any,
    *,
    only: Sequence[str] | None = None,
    allow_base_mismatch: bool = False,
    rngs: Any = None,
    params: Any = None,
    inputs: Any = None,
) -> Any:
    """Loads adapters into a model; returns what `apply_dora` returns, with trained adapters.

    An NNX model keeps its mode: adapter dropout acts if the model is in train mode. If none of its
    layers knows its mode, dropout does not act until `train()` is called.

    Args:
      path: a folder that `save` wrote, or one step of `Checkpoints`.
      model: an NNX model or a Linen module, plain or adapted. It is not changed.
      only: names or path suffixes of modules; the adapters of other modules stay as `apply_dora`
        initialises them.
      allow_base_mismatch: load them although the base is not the one they were trained for.
      rngs: for a plain model: as for `apply_dora`, a key for Linen; optional.
      params: of a plain Linen module.
      inputs: for a plain model: as for `apply_dora`.

    Returns:
      The adapted NNX model; for Linen the `DoRAModel` and the adapter tree.

    Raises:
      AdapterError: the adapters were trained for another base, or the model was adapted with other
        settings, or they lack the batch statistics of a module trained in full; names the layer. Or
        `only` is given where a function started the adapters, and the model is plain.
      CheckpointError: the folder is damaged or incomplete; names the file or array.
      ConfigError: an entry of `only` matches nothing.

    Warns:
      UserWarning: the adapters were saved without the fingerprint of their base. A Linen model is
        to be applied with the batch statistics in the folder.
    """
    config = read_config(path)
    if only is not None:
        check_start_of_others(config, model)
    model, own = adapt(model, config, Plain(rngs, params, inputs))
    saved = read_adapters(path, flatten(own))
    if saved.config != config:
        raise CheckpointError(f"{path} was replaced while it was loaded: load it anew")
    is_loaded = _selection(saved, only)
    chosen = {path: x for path, x in flatten(saved.adapters).items() if is_loaded(path[:-1])}
    base = {path: record for path, record in saved.base.items() if is_loaded(path)}
    wanted = tree_shapes(own)
    if only is not None:
        wanted = {p: shape for p, shape in wanted.items() if p in chosen}
    check_shapes(nest(chosen), wanted)
    check_settings(saved.config, layer_settings(model))
    records = check_same_base(base, model, allow_base_mismatch=allow_base_mismatch)
    statistics = statistics_to_load(model, saved.config, flatten(saved.statistics), is_loaded)
    if statistics:
        set_mutable_arrays(model, STATISTICS, statistics)
    return with_adapter_arrays(with_base_records(model, records), own, chosen)


def _selection(saved: SavedAdapters, only: Sequence[str] | None) -> Callable[[Path], bool]:
    """Returns whether the adapters of a module are loaded, as a function of its path.

    Raises:
      ConfigError: an entry of `only` matches nothing.
    """
    if only is None:
        return lambda path: True
    modules = {".".join(path[:i]) for path in flatten(saved.adapters) for i in range(1, len(path))}
    found = match_modules(tuple(only), modules, "only")
    return lambda path: any(".".join(path[:i]) in found for i in range(1, len(path) + 1))
