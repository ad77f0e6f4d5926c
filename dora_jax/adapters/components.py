"""The components of low-rank factors: a column of A with its row of B. Counted, and dropped.

A component whose row of B is zero adds nothing to the kernel, whatever its column of A holds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.groups import array_names
from dora_jax.adapters.trees import Tree, boxed_like, flatten, nest, unboxed
from dora_jax.config import DoRAConfig, LayerSettings, TrainedConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.processes import spans_processes
from dora_jax.selection import is_in_saved_module


class LowRank(NamedTuple):
    """The factors of one layer: arrays, or what stands in their place in a like tree.

    Attributes:
      lora_a: `(*stack, *in, r)`.
      lora_b: `(*stack, r, *out)`.
    """

    lora_a: Any
    lora_b: Any


def low_rank_layers(adapters: Any) -> dict[Path, LowRank]:
    """Returns the factors of every layer that has them, by path, in the tree's order.

    Layers of rank 0 have none. The tree may be a state of NNX variables, or of gradients.

    Raises:
      AdapterError: a layer has one factor alone; names it.
    """
    found: dict[Path, dict[str, Any]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(adapters)[0]:
        names = array_names(keys)
        if names[-1] in LowRank._fields:
            found.setdefault(names[:-1], {})[names[-1]] = leaf
    for path, factors in found.items():
        for name in LowRank._fields:
            if name not in factors:
                raise AdapterError(
                    f"{layer_name(path)} has no {name}: a component is a column of lora_a with its "
                    "row of lora_b, so both must be in the tree, or neither"
                )
    return {path: LowRank(**factors) for path, factors in found.items()}


def count_stack_axes(
    path: Path, layer: LowRank, axes: Mapping[Path, KernelAxes] | None = None
) -> int:
    """Returns the number of stack axes of a layer.

    They are the first axes of `lora_a (*stack, *in, r)` and of `lora_b (*stack, r, *out)`. Without
    `axes` the shapes tell, unless they allow several numbers.

    Raises:
      AdapterError: the shapes do not show it; names the layer.
    """
    if axes and path in axes:
        return len(axes[path].stack)
    a, b = np.shape(layer.lora_a), np.shape(layer.lora_b)
    possible = [n for n in range(min(len(a) - 1, len(b))) if a[:n] == b[:n] and b[n] == a[-1]]
    if len(possible) != 1:
        raise AdapterError(
            f"{layer_name(path)}: the shapes of lora_a {a} and lora_b {b} do not show how many "
            "axes are stack axes: pass axes, from dora_jax.model.layer_axes(model) or "
            "read_adapters(path).axes"
        )
    return possible[0]


def component_ranks(adapters: Any, axes: Mapping[Path, KernelAxes] | None = None) -> dict[str, Any]:
    """Returns how many components of each layer have a row of B that is not zero.

    Args:
      adapters: an adapter tree, with values.
      axes: of the kernels, by path: `dora_jax.model.layer_axes(model)`. Needed only where the
        shapes of the factors do not show which axes are stacked.

    Returns:
      A number for each dotted path, or nested lists of them, of the stack's shape.

    Example:
      >>> b = jnp.zeros((3, 2, 5)).at[0].set(1.0).at[1, 0].set(1.0)
      >>> component_ranks({"up": {"lora_a": jnp.ones((3, 4, 2)), "lora_b": b}})
      {'up': [2, 1, 0]}
    """
    layers = low_rank_layers(unboxed(adapters))
    live = {p: _live(p, layer, count_stack_axes(p, layer, axes)) for p, layer in layers.items()}
    return {".".join(path): own.sum(-1).tolist() for path, own in live.items()}


def compress(
    adapters: Tree, config: DoRAConfig, axes: Mapping[Path, KernelAxes] | None = None
) -> tuple[Any, DoRAConfig]:
    """Returns adapters without the components whose row of B is zero, and their configuration.

        {"up":   {"lora_a": (in, 8), "lora_b": (8, out), "magnitude": (out,)},   # 5 rows not zero
         "down": {"lora_a": (out, 8), "lora_b": (8, in), "magnitude": (in,)}}    # none
        -> {"up": {"lora_a": (in, 5), "lora_b": (5, out), "magnitude": (out,)},
            "down": {"magnitude": (in,)}}

    The adapters compute what they did: `rank_pattern` and `alpha_pattern` hold each layer's own
    rank, and the alpha that keeps its scaling. Layers of one stack share a rank, the largest among
    them. A layer without a component keeps its magnitude alone; if it trains none, it keeps one
    component that is zero.

    Args:
      adapters: an adapter tree, as `training.adaptive_rank` leaves it.
      config: the configuration that it was trained with.
      axes: as for `component_ranks`.

    Returns:
      The tree, and the configuration with which to adapt a base for it.

    Raises:
      AdapterError: the ranks are not those of `config`, its `init` starts products that are not
        zero, or the arrays are on several hosts.

    Example:
      >>> b = jnp.ones((3, 5)).at[1].set(0.0)
      >>> tree = {"up": {"lora_a": jnp.ones((4, 3)), "lora_b": b, "magnitude": jnp.ones(5)}}
      >>> smaller, config = compress(tree, DoRAConfig(rank=3, alpha=6.0))
      >>> jax.tree.map(jnp.shape, smaller["up"])
      {'lora_a': (4, 2), 'lora_b': (2, 5), 'magnitude': (5,)}
      >>> config.layer_settings(("up",)).rank, config.layer_settings(("up",)).scaling
      (2, 2.0)
    """
    if config.changes_product:
        raise AdapterError(
            f"adapters initialised with init={config.init!r} have no components to drop, because "
            "only the change from their initial product counts: merge them instead"
        )
    plain = unboxed(adapters)
    flat = flatten(plain)
    ranks = {p[:-1]: 0 for p in flat if p[-1] == "magnitude" and not is_in_saved_module(config, p)}
    for path, layer in low_rank_layers(plain).items():
        if is_in_saved_module(config, path):
            continue
        settings = config.layer_settings(path)
        _check_rank(path, layer, settings)
        stack = count_stack_axes(path, layer, axes)
        live = _live(path, layer, stack)
        ranks[path] = max(int(live.sum(-1).max()), 0 if settings.has_magnitude else 1)
        for name, x in zip(LowRank._fields, _kept(layer, live, ranks[path], stack), strict=True):
            flat[*path, name] = x
            if not ranks[path]:
                del flat[*path, name]
    boxes = {path: box for path, box in _boxes(adapters).items() if path in flat}
    return boxed_like(nest(flat), nest(boxes)), _with_ranks(config, ranks)


def _live(path: Path, layer: LowRank, stack: int) -> np.ndarray:
    """Returns which components have a row of B that is not zero: `(*stack, r)`, on the host."""
    if spans_processes(layer.lora_b):
        raise AdapterError(
            f"{layer_name(path)}: lora_b is on devices of several processes: save the adapters, "
            "and load them in one"
        )
    b = np.asarray(layer.lora_b)
    return np.any(b != 0, axis=tuple(range(stack + 1, b.ndim)))


def _kept(layer: LowRank, live: np.ndarray, rank: int, stack: int) -> LowRank:
    """Returns the live components, in order, and zero ones up to a rank."""
    first = np.argsort(~live, axis=-1, stable=True)[..., :rank]
    a, b = map(np.asarray, layer)
    of_a = first.reshape(*first.shape[:-1], *(1,) * (a.ndim - first.ndim), rank)
    of_b = first.reshape(*first.shape, *(1,) * (b.ndim - first.ndim))
    kept = np.take_along_axis(a, of_a, -1), np.take_along_axis(b, of_b, stack)
    return LowRank(*map(jnp.asarray, kept))


def _check_rank(path: Path, layer: LowRank, settings: LayerSettings) -> None:
    if (rank := np.shape(layer.lora_a)[-1]) != settings.rank:
        raise AdapterError(
            f"{layer_name(path)}: the adapters have rank {rank}, the configuration "
            f"{settings.rank}; pass the configuration that they were trained with"
        )


def _with_ranks(config: DoRAConfig, ranks: Mapping[Path, int]) -> DoRAConfig:
    """Returns a configuration in which each layer has its own rank, and the scaling as it was."""
    alphas = {
        path: config.layer_settings(path).scaling * (math.sqrt(rank) if config.use_rslora else rank)
        for path, rank in ranks.items()
        if rank
    }
    keys = {path: "^" + re.escape(".".join(path)) for path in ranks}
    own = dataclasses.replace(
        config,
        rank_pattern={keys[path]: rank for path, rank in ranks.items()},
        alpha_pattern={keys[path]: alpha for path, alpha in alphas.items()},
    )
    return TrainedConfig.of(own)


def _boxes(adapters: Tree) -> dict[Path, Any]:
    """Returns the leaves of nested dicts by path, with Flax's boxes around them."""
    found: dict[Path, Any] = {}
    for key, value in adapters.items():
        inner = _boxes(value) if isinstance(value, Mapping) else {(): value}
        found |= {(key, *path): leaf for path, leaf in inner.items()}
    return found
