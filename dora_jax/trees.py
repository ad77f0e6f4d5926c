"""Nested dicts by module path: what stands where, and copies with some of it exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import meta

from dora_jax.config import AdapterError, Path

Tree = Mapping[str, Any]


def get_in(tree: Tree, path: Path, tree_name: str = "the parameters") -> Any:
    """Returns what stands at `path`; raises AdapterError where nothing does."""
    for i, key in enumerate(path):
        if key not in tree:
            raise AdapterError(f"no entry {'.'.join(path[: i + 1])} in {tree_name}")
        tree = tree[key]
    return tree


def has_path(tree: Any, path: Path) -> bool:
    """Returns whether anything stands at `path`."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def set_in(tree: Tree, path: Path, value: Any) -> Any:
    """Returns a copy of nested dicts with `value` at `path`; what is not on the path is shared."""
    if not path:
        return value
    return {**tree, path[0]: set_in(tree.get(path[0], {}), path[1:], value)}


def overlay(tree: Tree, over: Tree, path: Path = ()) -> dict[str, Any]:
    """Returns nested dicts with the leaves of `over` in place of those of `tree`, boxes kept."""
    result = dict(tree)
    for key, value in over.items():
        inner = (*path, key)
        if key not in tree:
            raise AdapterError(f"the adapters have {'.'.join(inner)}, the parameters do not")
        if isinstance(value, Mapping):
            result[key] = overlay(tree[key], value, inner) if value else tree[key]
        elif np.shape(value) != (shape := np.shape(meta.unbox(tree[key]))):
            raise AdapterError(
                f"{'.'.join(inner)} has shape {np.shape(value)} in the adapters and {shape} in "
                "the parameters"
            )
        else:
            result[key] = meta.replace_boxed(tree[key], value)
    return result
