"""The arrays and the metadata that are saved for adapters, whichever way they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dora_jax.adapters.trees import Tree, check_finite, nest
from dora_jax.checkpoint.checks import check_settings, check_tree
from dora_jax.checkpoint.manifest import slashed
from dora_jax.config import DoRAConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError, Path
from dora_jax.model import (
    STATISTICS,
    AdaptedModel,
    adapter_tree,
    base_records,
    carries_arrays,
    check_own_base,
    is_adapted,
    layer_axes,
    layer_settings,
    mutable_arrays,
)
from dora_jax.version import __version__


class Trained(NamedTuple):
    """Adapters with their configuration, and with their model where it is known.

    Attributes:
      model: the adapted model of either front end; None for an adapter tree alone.
      adapters: the adapter tree.
      config: the configuration that the adapters were trained with.
    """

    model: AdaptedModel | None
    adapters: Tree
    config: DoRAConfig


def trained(model: Any, content: Any) -> Trained:
    """Returns the adapters that two arguments of `save` stand for.

    Raises:
      AdapterError: the model is not adapted, or an NNX model lacks its configuration.
    """
    if isinstance(model, DoRAConfig):
        return Trained(None, content, model)
    if not is_adapted(model):
        raise AdapterError("the model has no adapter: apply_dora first; a merged one has none left")
    if not carries_arrays(model):
        return Trained(model, content, model.config)
    if not isinstance(content, DoRAConfig):
        raise AdapterError("an NNX model is saved with its DoRAConfig: save(path, model, config)")
    return Trained(model, adapter_tree(model), content)


def contents(
    own: Trained, statistics: Mapping[Path, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays and the metadata to save for adapters.

        {"adapters": {"up": {"lora_a": ...}}, "base": {"up": {"norm": ..., "first_row": ...}},
         "statistics": {"norm": {"mean": ...}}}

    `statistics` are the batch statistics of a Linen model; an NNX model carries its own.

    Raises:
      AdapterError: see `save`.
    """
    if own.model is None:
        check_tree(own.adapters, own.config, None)
        return {"adapters": own.adapters}, _metadata(own.config, {})
    check_own_base(own.model)
    check_settings(own.config, layer_settings(own.model))
    check_tree(own.adapters, own.config, own.model)
    statistics = mutable_arrays(own.model, STATISTICS) | dict(statistics or {})
    check_finite(nest(statistics))
    records = base_records(own.model).items()
    base = nest({(*path, name): x for path, kept in records for name, x in kept.arrays().items()})
    tree = {"adapters": own.adapters, "base": base, "statistics": nest(statistics)}
    return tree, _metadata(own.config, layer_axes(own.model))


def _metadata(config: DoRAConfig, axes: Mapping[Path, KernelAxes]) -> dict[str, Any]:
    groups = {slashed(path): [list(group) for group in own] for path, own in axes.items()}
    return {"version": __version__, "config": config.to_dict(), "axes": groups}
