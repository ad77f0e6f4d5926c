"""Nested dicts by module path: look-up, flattening, checks, and copies with entries replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from dora_jax.adapters.placement import host_value
from dora_jax.errors import AdapterError, Path, listing
from dora_jax.layers.quantized_box import QuantizedBox
from dora_jax.processes import spans_processes

Tree = Mapping[str, Any]


def get_in(tree: Tree, path: Path, tree_name: str = "the parameters") -> Any:
    """Returns the entry at `path`; raises `AdapterError` if there is none."""
    for i, key in enumerate(path):
        if key not in tree:
            raise AdapterError(f"no entry {'.'.join(path[: i + 1])} in {tree_name}")
        tree = tree[key]
    return tree


def has_path(tree: Any, path: Path) -> bool:
    """Returns whether nested dicts have an entry at `path`."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def set_in(tree: Tree, path: Path, value: Any) -> Any:
    """Returns a copy of nested dicts with `value` at `path`; other branches are shared, not copied.

        {"up": {"kernel": W}, "norm": N}  ->  {"up": {"kernel": W, "bias": value}, "norm": N}

    for the path `("up", "bias")`.
    """
    if not path:
        return value
    return {**tree, path[0]: set_in(tree.get(path[0], {}), path[1:], value)}


def overlay(tree: Tree, over: Tree, path: Path = ()) -> dict[str, Any]:
    """Returns `tree` with the leaves of `over` in place of its own; Flax's boxes are kept.

        tree {"head": {"kernel": Partitioned(W), "bias": b}}, over {"head": {"kernel": V}}
        -> {"head": {"kernel": Partitioned(V), "bias": b}}

    Raises:
      AdapterError: `tree` lacks an entry of `over`, or has it in another shape; names it.
    """
    result = dict(tree)
    for key, value in over.items():
        inner = (*path, key)
        if key not in tree:
            raise AdapterError(f"the adapters have {'.'.join(inner)}, the parameters do not")
        if isinstance(value, Mapping):
            result[key] = overlay(tree[key], value, inner) if value else tree[key]
        elif np.shape(value) != (shape := np.shape(unboxed(tree[key]))):
            raise AdapterError(
                f"{'.'.join(inner)} has shape {np.shape(value)} in the adapters and {shape} in "
                "the parameters"
            )
        else:
            result[key] = meta.replace_boxed(tree[key], value)
    return result


def unboxed(tree: Any) -> Any:
    """Returns a tree without Flax's boxes around its arrays, such as `nn.Partitioned`.

    Unlike `flax.core.meta.unbox` it constrains no sharding, so that arrays may be abstract, and
    dequantises nothing.
    """

    def inner(box: Any) -> Any:
        kept = isinstance(box, meta.Partitioned | QuantizedBox)
        return unboxed(box.value if kept else box.unbox())

    return meta.map_axis_meta(inner, tree)


def boxed_like(tree: Any, like: Any) -> Any:
    """Returns nested dicts with each array in a box like that around it in another tree."""
    for path, box in _with_paths(like, meta.is_axis_metadata):
        if isinstance(box, meta.AxisMetadata):
            tree = set_in(tree, path, box.replace_boxed(get_in(tree, path, "the adapters")))
    return tree


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """Returns the leaves of an adapter tree, or of any other pytree, by path; without boxes.

        {"layers": [{"kernel": W0}, {"kernel": W1}]}
        -> {("layers", "0", "kernel"): W0, ("layers", "1", "kernel"): W1}

    Args:
      tree: any pytree; the keys of its paths become strings.
      is_leaf: as for `jax.tree.leaves`.

    Raises:
      AdapterError: two leaves have the same path, such as those of the keys 0 and "0".

    Example:
      >>> flatten({"query": {"magnitude": 1.0}})
      {('query', 'magnitude'): 1.0}
    """
    flat: dict[Path, Any] = {}

    def ends(node: Any) -> bool:
        return meta.is_axis_metadata(node) or bool(is_leaf and is_leaf(node))

    for path, node in _with_paths(tree, ends):
        # A box may hold no array, as in an optimiser's state that masks it.
        inner = flatten(unboxed(node), is_leaf) if meta.is_axis_metadata(node) else {(): node}
        for tail, leaf in inner.items():
            if (*path, *tail) in flat:
                raise AdapterError(
                    f"the tree has two leaves {'.'.join((*path, *tail))}: rename one"
                )
            flat[*path, *tail] = leaf
    return flat


def _with_paths(tree: Any, is_leaf: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        yield tuple(jax.tree_util.keystr((key,), simple=True) for key in keys), leaf


def nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns nested dicts from leaves by path: the inverse of `flatten` for nested dicts.

    Example:
      >>> nest({("layers", "0"): 1})
      {'layers': {'0': 1}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def tree_shapes(adapters: Mapping[str, Any]) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every array of an adapter tree by path."""
    return {path: np.shape(leaf) for path, leaf in flatten(adapters).items()}


def check_shapes(adapters: Mapping[str, Any], wanted: Mapping[Path, tuple[int, ...]]) -> None:
    """Raises `AdapterError` if arrays are missing, unknown or of another shape; names each one."""
    given = tree_shapes(adapters)
    problems = [f"missing {'.'.join(p)}" for p in wanted if p not in given]
    problems += [f"unknown {'.'.join(p)}" for p in given if p not in wanted]
    problems += [
        f"{'.'.join(p)} has shape {given[p]}, the model needs {shape}"
        for p, shape in wanted.items()
        if p in given and given[p] != shape
    ]
    if problems:
        raise AdapterError("the adapters are of another model: " + "; ".join(problems))


def check_finite(adapters: Tree) -> None:
    """Raises `AdapterError` if arrays of an adapter tree are not finite; names them.

    Under a transformation, where values are not known, nothing is checked.
    """
    known = {p: x for p, x in flatten(adapters).items() if not isinstance(x, jax.core.Tracer)}
    shared = {path: x for path, x in known.items() if spans_processes(x)}
    finite = _are_finite(shared) if shared else {}
    if lost := [
        ".".join(path)
        for path, x in known.items()
        if not (finite[path] if path in finite else np.isfinite(host_value(x)).all())
    ]:
        raise AdapterError(
            f"{listing(lost)} {'is' if len(lost) == 1 else 'are'} not finite: the training "
            "diverged; restore an earlier checkpoint"
        )


@jax.jit
def _are_finite(arrays: Mapping[Path, jax.Array]) -> dict[Path, jax.Array]:
    """Returns for each array, which no process holds whole, what every process then knows."""
    return {path: jnp.isfinite(x).all() for path, x in arrays.items()}
