"""Ranks that training shares out among the layers, within one budget: AdaLoRA (arXiv 2303.10512).

The paper writes a change as `P diag(l) Q`, and prunes entries of `l`. Here a change is `A B`: the
k-th component is a column of A with its row of B, and to prune it is to set that row to zero. What
follows from the difference:

- The row of B takes the place of `l_k` with the k-th row of `Q`. A score is the mean over the
  column of A plus the mean over the row of B; the paper has the score of `l_k` as a third term.
- As `l_k` in the paper, a row at zero has a gradient, and its column of A has none. The column
  stays, so that the component may come back.
- Rows of B hold the sizes of the components, so only the columns of A are kept orthogonal, and of
  any length. Then `||A B||_F^2` is the sum over the components of `||a_k||^2 ||b_k||^2`.
- Between two selections all rows are trained, and the optimiser keeps its moments of rows at zero;
  both as in the paper. From the last selection on such a row is set to zero after every update.
- The gradient of a penalty in the loss counts in the scores, as in the paper. So does a gradient
  that is not finite, from then on, unless `optax.apply_if_finite` is around the whole.
- DoRA's magnitudes are neither scored nor pruned. They are lengths of the columns of the adapted
  kernel, whatever its components, so that pruning one changes directions alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dora_jax.adapters.components import LowRank, low_rank_layers
from dora_jax.adapters.groups import array_names
from dora_jax.adapters.origin import origin_of
from dora_jax.adapters.trees import nest
from dora_jax.errors import AdapterError, ConfigError, Path, layer_name
from dora_jax.training.sensitivity import Axes, component_shape, mean_scores, smoothed, start
from dora_jax.validation import is_integer, is_number


class AdaptiveRankState(NamedTuple):
    """State of `adaptive_rank`. Two float32 numbers for every entry of the factors.

    Attributes:
      count: updates so far, int32.
      sensitivity: like the adapters, with `optax.MaskedNode` in place of other arrays than factors:
        the smoothed `|w dL/dw|` of every entry.
      uncertainty: the smoothed distance of `|w dL/dw|` from that, likewise.
      kept: by module path, `{"kept": (*stack, r)}` in bool: the components of the last selection.
      inner: the state of the optimiser.
    """

    count: Any
    sensitivity: Any
    uncertainty: Any
    kept: Any
    inner: Any


def adaptive_rank(
    optimizer: optax.GradientTransformation,
    budget: int,
    *,
    begin: int,
    end: int,
    interval: int = 10,
    decays: tuple[float, float] = (0.85, 0.85),
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser so that all layers share one budget of components (arXiv 2303.10512).

    Start with adapters of a larger rank than wanted. At every `interval`-th update from `begin` on
    the components of all layers are ranked by score; the best stay, the others' rows of B become
    zero. How many stay falls as a cubic, rounded, from all at `begin` to `budget` at `end` (section
    3.3); from then on the same ones stay. These numbers are exact: equal scores go to the earlier
    layer. Between two selections all rows are trained, so that components may come back.

    Shapes never change: a training step is compiled once. `adapters.compress` drops the zero
    components at the end. `orthogonality_penalty` belongs into the loss.

    Args:
      optimizer: such as `dora_optimizer(1e-3)`, with clipping and all else that changes updates.
      budget: components at the end, in all layers together, those of a stack too: a mean rank of 2
        over 24 kernels is 48. A component counts as one, whatever the size of its kernel.
      begin, end: updates, counted from 1; t_i and T - t_f in the paper.
      interval: updates from one selection to the next. With 1, a component that is out comes back
        only if others get worse.
      decays: of the smoothed sensitivity and uncertainty, beta_1 and beta_2 in the paper.
      axes: of the kernels, by path: `dora_jax.model.layer_axes(model)`. Needed only where the
        shapes of the factors do not show which axes are stacked.

    Raises:
      ConfigError: a number is out of range; from `init`, `budget` is above what there is.
      AdapterError: from `init`, if no layer has factors, one has one alone, or their product is
        known not to start at zero ("pissa", "olora"); from `update` without the adapters.

    Example:
      >>> layer = {"lora_a": jnp.ones((4, 3)), "lora_b": jnp.ones((3, 2))}
      >>> slopes = jnp.array([[0.1], [3.0], [0.2]])
      >>> gradients = {"lora_a": jnp.zeros((4, 3)), "lora_b": layer["lora_b"] * slopes}
      >>> tx = adaptive_rank(optax.sgd(0.1), budget=1, begin=0, end=1)
      >>> updates, _ = tx.update(gradients, tx.init(layer), layer)
      >>> print(optax.apply_updates(layer, updates)["lora_b"].round(1)[:, 0])
      [0.  0.7 0. ]
    """
    _check_numbers(budget, begin, end, interval, decays)
    inner = optax.with_extra_args_support(optimizer)
    own = _Selection(budget, begin, end, interval, decays, axes)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, own, inner), functools.partial(_update, own, inner)
    )


class _Selection(NamedTuple):
    """The arguments of `adaptive_rank`, without the optimiser."""

    budget: int
    begin: int
    end: int
    interval: int
    decays: tuple[float, float]
    axes: Axes | None


def _init(
    own: _Selection, inner: optax.GradientTransformationExtraArgs, params: Any
) -> AdaptiveRankState:
    layers = low_rank_layers(params)
    shapes = {path: component_shape(path, layer, own.axes) for path, layer in layers.items()}
    _check_layers(layers, own.budget, sum(map(math.prod, shapes.values())))
    kept = _nest_kept({path: jnp.ones(shape, bool) for path, shape in shapes.items()})
    count = jnp.zeros((), jnp.int32)
    return AdaptiveRankState(count, start(params), start(params), kept, inner.init(params))


def _update(
    own: _Selection,
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: AdaptiveRankState,
    params: Any = None,
    **extra: Any,
) -> tuple[Any, AdaptiveRankState]:
    if params is None:
        raise AdapterError(
            "adaptive_rank needs the adapters: tx.update(gradients, state, adapters)"
        )
    sensitivity, uncertainty = smoothed(
        updates, params, state.sensitivity, state.uncertainty, own.decays
    )
    updates, inner_state = inner.update(updates, state.inner, params, **extra)
    count = state.count + 1
    regular = (count >= own.begin) & (count < own.end) & ((count - own.begin) % own.interval == 0)
    selects = regular | (count == own.end)
    best = _best(mean_scores(sensitivity, uncertainty, own.axes), count, own)
    kept = {path: jnp.where(selects, best[path], x) for path, x in _flat_kept(state.kept).items()}
    prunes = selects | (count > own.end)
    updates = _without(updates, params, {path: x | ~prunes for path, x in kept.items()})
    return updates, AdaptiveRankState(
        count, sensitivity, uncertainty, _nest_kept(kept), inner_state
    )


def component_scores(state: AdaptiveRankState, axes: Axes | None = None) -> dict[Path, Any]:
    """Returns the scores by which `adaptive_rank` selects, `(*stack, r)` float32 for each layer.

    A score is the mean over the column of A, plus the mean over the row of B, of the smoothed
    sensitivity times the smoothed uncertainty of each entry.

    Args:
      state: of `adaptive_rank`.
      axes: as for `adaptive_rank`.
    """
    return mean_scores(state.sensitivity, state.uncertainty, axes)


def _best(scores: Mapping[Path, Any], count: Any, own: _Selection) -> dict[Path, Any]:
    """Returns which components an update keeps, if it selects: the best of all layers."""
    every = jnp.concatenate([jnp.ravel(x) for x in scores.values()])
    steps = own.end - own.begin
    schedule = optax.polynomial_schedule(every.size, own.budget, 3, steps, own.begin)
    number = jnp.floor(schedule(count) + 0.5).astype(jnp.int32)
    order = jnp.argsort(-every, stable=True)
    ranked = jnp.zeros(every.size, bool).at[order].set(jnp.arange(every.size) < number)
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    parts = zip(scores.items(), jnp.split(ranked, ends), strict=True)
    return {path: part.reshape(x.shape) for (path, x), part in parts}


def _without(updates: Any, params: Any, kept: Mapping[Path, Any]) -> Any:
    """Returns updates that set the rows of B of other components than the kept ones to zero."""
    layers = low_rank_layers(params)

    def final(keys: Any, x: Any) -> Any:
        *path, name = array_names(keys)
        if name != "lora_b":
            return x
        own, b = kept[tuple(path)], layers[tuple(path)].lora_b
        stays = own.reshape(*own.shape, *(1,) * (b.ndim - own.ndim))
        return jnp.where(stays, x, -b)  # `b + (-b)` is 0 in every dtype

    return jax.tree_util.tree_map_with_path(final, updates)


def _nest_kept(kept: Mapping[Path, Any]) -> dict[str, Any]:
    return nest({(*path, "kept"): own for path, own in kept.items()})


def _flat_kept(kept: Any) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(kept)[0]
    return {array_names(keys)[:-1]: own for keys, own in leaves}


def _check_layers(layers: Mapping[Path, LowRank], budget: int, size: int) -> None:
    if not layers:
        raise AdapterError(
            "no low-rank factors among the parameters to optimise: give wrt=DoRAParam in NNX, the "
            "adapter tree in Linen, and a rank above 0"
        )
    for path, layer in layers.items():
        if (origin_of(layer.lora_b) or {}).get("changes_product"):
            raise AdapterError(
                f"{layer_name(path)}: its product does not start at zero (init), so that a row of "
                "zeros does not drop a component: adapt with another init"
            )
    if budget > size:
        raise ConfigError(f"budget must be at most the number of components {size}, got {budget}")


def _check_numbers(
    budget: int, begin: int, end: int, interval: int, decays: tuple[float, float]
) -> None:
    for name, value, least in (
        ("budget", budget, 1),
        ("begin", begin, 0),
        ("end", end, begin + 1 if is_integer(begin) else 1),
        ("interval", interval, 1),
    ):
        if not is_integer(value) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    if len(decays) != 2 or not all(is_number(d) and 0 <= d < 1 for d in decays):
        raise ConfigError(f"decays must be two numbers in [0, 1), got {decays!r}")
