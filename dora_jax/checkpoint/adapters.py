"""Adapters on disk, in Orbax's format: saved with their configuration and the mark of their base.

Only what was trained is written. `load` adapts the base anew and puts it in.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx

from dora_jax import linen as dora_linen
from dora_jax import nnx as dora_nnx
from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import check_shapes, flatten, nest, tree_shapes
from dora_jax.checkpoint.checks import check_settings, check_tree
from dora_jax.checkpoint.fingerprint import reconcile
from dora_jax.checkpoint.storage import absolute, read, read_metadata, write
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, CheckpointError, Path
from dora_jax.model import Bases, Tree, _adapt, bases_of, group_bases, layer_settings, with_bases
from dora_jax.nnx.variables import set_nnx_values
from dora_jax.selection import match_modules

if TYPE_CHECKING:
    from os import PathLike


@dataclasses.dataclass(frozen=True)
class SavedAdapters:
    """What a folder of adapters holds.

    Attributes:
      adapters: the adapter tree, of NumPy arrays.
      config: the configuration they were trained with.
      base: by module path, `norm` and `row` (`dora_jax.decomposition.describe_base`) of the
        kernels they were trained for; empty where they were saved without their model.
      version: of the dora_jax that wrote them.
    """

    adapters: dict[str, Any]
    config: DoRAConfig
    base: Bases
    version: str


def save(
    path: str | PathLike[str],
    adapters: nnx.Module | Tree,
    config: DoRAConfig | dora_linen.DoRAModel,
    *,
    overwrite: bool = False,
) -> None:
    """Saves adapters with their configuration, checksums, and the mark of their base.

    The folder appears when it is complete; a process killed before leaves none. The base is not
    saved.

    Args:
      path: a folder, which is made.
      adapters: an adapted NNX model, or the adapter tree of a Linen one.
      config: the configuration; for a tree better the `DoRAModel`, which knows its base: without,
        `load` cannot tell another base.
      overwrite: exchange what is there.

    Raises:
      AdapterError: the adapters are not of this configuration, hoisted, or not finite; names them.
      CheckpointError: the folder exists.

    Example:
      >>> import tempfile
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
    write(path, *contents(adapters, config), overwrite=overwrite)


def load(
    path: str | PathLike[str],
    model: Any,
    *,
    only: Sequence[str] | None = None,
    allow_base_mismatch: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads adapters into a model: what `apply_dora` returns, trained.

    Args:
      path: a folder that `save` wrote, or one step of `Checkpoints`.
      model: an NNX model or a Linen module, plain or adapted. It stays as it is.
      only: names or path suffixes of modules; adapters of others are left as `apply_dora` makes
        them.
      allow_base_mismatch: load them although the base is not the one they were trained for.
      **kwargs: further arguments of `apply_dora` for a plain model: `params` and `inputs` of a
        Linen module. `rngs` (NNX), `rng` (Linen) need not be given.

    Returns:
      The adapted NNX model; for Linen the `DoRAModel` and the adapter tree.

    Raises:
      AdapterError: the adapters were trained for another base, or with settings that a model which
        is adapted already does not have; names the layer.
      CheckpointError: the folder is damaged or incomplete; names the file or array.
      ConfigError: an entry of `only` matches nothing.

    Warns:
      UserWarning: the adapters were saved without the mark of their base.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> import dora_jax as dora
      >>> from flax import linen as nn
      >>> module, x = nn.Dense(3), jnp.ones((5, 4))
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> given = {"params": params, "inputs": (x,)}
      >>> model, adapters = dora.apply_dora(
      ...     module, dora.DoRAConfig(rank=2), rng=jax.random.key(1), **given
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/adapter", adapters, model)
      ...     model, loaded = load(f"{folder}/adapter", module, **given)
      >>> bool((loaded["lora_a"] == adapters["lora_a"]).all())
      True
    """
    saved = read_adapters(path)
    if only is not None and isinstance(model, dora_linen.DoRAModel):
        raise TypeError("only needs the plain module: a DoRAModel has no adapters of its own")
    model, own = _adapt(model, saved.config, kwargs)
    chosen, base = flatten(saved.adapters), saved.base
    wanted = tree_shapes(own)
    if only is not None:
        chosen, base = _choose(chosen, base, only)
        wanted = {p: shape for p, shape in wanted.items() if p in chosen}
    check_shapes(nest(chosen), wanted)
    check_settings(saved.config, layer_settings(model))
    model = with_bases(model, check_same_base(base, model, allow_base_mismatch=allow_base_mismatch))
    if isinstance(model, dora_linen.DoRAModel):
        given = flatten(own)
        return model, nest(given | {p: device_put_like(x, given[p]) for p, x in chosen.items()})
    set_nnx_values(model, dora_nnx.DoRAParam, chosen)
    return model


def read_adapters(path: str | PathLike[str]) -> SavedAdapters:
    """Reads a folder of adapters without a model.

    Raises:
      CheckpointError: the folder is damaged or incomplete; names the file or array.
    """
    folder = absolute(path)
    if folder.is_dir() and not (folder / "metadata").exists():
        steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
        if steps:
            raise CheckpointError(
                f"{folder} holds checkpoints of a training run: name one, such as "
                f"{folder / str(steps[-1])}"
            )
    _, metadata = read_metadata(folder)
    if not isinstance(metadata, dict) or "config" not in metadata:
        raise CheckpointError(f"{folder} holds no configuration of adapters")
    config = DoRAConfig.from_json(json.dumps(metadata["config"]))
    arrays = read(folder, lambda path: path[0] in ("adapters", "base"))
    base = group_bases({p[1:]: x for p, x in arrays.items() if p[0] == "base"})
    adapters = nest({p[1:]: x for p, x in arrays.items() if p[0] == "adapters"})
    return SavedAdapters(adapters, config, base, metadata["version"])


def contents(
    adapters: nnx.Module | Tree, config: DoRAConfig | dora_linen.DoRAModel
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays and the metadata to save for adapters; checks that they are of `config`.

    Raises:
      AdapterError: see `save`.
    """
    model: Any = None
    if isinstance(adapters, nnx.Module):
        model, adapters = adapters, dora_nnx.get_adapters(adapters)
        dora_nnx.check_base(model)
        if isinstance(config, dora_linen.DoRAModel):
            raise AdapterError("config must be the DoRAConfig of the NNX model")
        check_settings(config, layer_settings(model))
    elif isinstance(config, dora_linen.DoRAModel):
        model, config = config, config.config
    check_tree(adapters, config, model)
    tree = {"adapters": adapters}
    if model is not None:
        bases = bases_of(model)
        tree["base"] = nest({(*p, n): x for p, base in bases.items() for n, x in base.items()})
    return tree, {"version": library_version(), "config": config.to_dict()}


def check_same_base(saved: Bases, model: Any, *, allow_base_mismatch: bool) -> Bases:
    """Returns what the layers of a model are to keep of their base, see `reconcile`; or warns."""
    if not saved and not allow_base_mismatch:
        warnings.warn(
            "the adapters were saved without the mark of their base, so that another base would "
            "not be noticed; allow_base_mismatch=True says that this is known",
            stacklevel=3,
        )
    return reconcile(saved, bases_of(model), allow_base_mismatch=allow_base_mismatch)


def library_version() -> str:
    """Returns the version of dora_jax, as installed."""
    try:
        return importlib.metadata.version("dora-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def _choose(
    flat: Mapping[Path, Any], bases: Bases, only: Sequence[str]
) -> tuple[dict[Path, Any], Bases]:
    """Returns the arrays, and what is kept of the base, of the modules that names select."""
    modules = {".".join(path[:i]) for path in flat for i in range(1, len(path))}
    found = match_modules(tuple(only), modules, "only")

    def inside(path: Path) -> bool:
        return any(".".join(path[:i]) in found for i in range(1, len(path) + 1))

    return (
        {p: x for p, x in flat.items() if inside(p[:-1])},
        {p: base for p, base in bases.items() if inside(p)},
    )
