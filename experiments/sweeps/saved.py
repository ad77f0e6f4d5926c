"""Arrays of a sweep on disk: trained members, and checkpoints of members in training."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array


def save_arrays(file: Path, arrays: Iterable[tuple[str, Any]]) -> None:
    """Writes named arrays, so that the file is whole at any moment."""
    partial = file.with_name(file.name + ".part")
    with partial.open("wb") as stream:
        np.savez(stream, **{name: _plain(x) for name, x in arrays})  # type: ignore[arg-type]
    os.replace(partial, file)


def load_arrays(file: Path, names: Iterable[str]) -> list[np.ndarray]:
    """Returns the arrays of these names from a file that `save_arrays` wrote."""
    with np.load(file) as arrays:
        return [arrays[name] for name in names]


class Checkpoint:
    """The state of members in training, to go on from after an interruption.

    Args:
        folder: Of all checkpoints; this one has a file in it.
        configs: Everything that the state depends on, as JSON. Other members have another file.
    """

    def __init__(self, folder: Path, configs: Sequence[dict[str, Any]]) -> None:
        text = json.dumps(configs, sort_keys=True, default=str)
        self._file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"

    def save(self, step: int, state: Any) -> None:
        """Writes the state after a step in the place of an earlier one."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        leaves = enumerate(jax.tree.leaves(state))
        save_arrays(self._file, [("step", np.array(step)), *((str(i), x) for i, x in leaves)])

    def restore(self, like: Any) -> tuple[int, Any]:
        """Returns the step and the state that were saved; 0 and `like` itself if none was."""
        if not self._file.exists():
            return 0, like
        leaves, structure = jax.tree.flatten(like)
        with np.load(self._file) as saved:
            step = int(saved["step"])
            restored = [_like(saved[str(i)], leaf) for i, leaf in enumerate(leaves)]
        return step, jax.tree.unflatten(structure, restored)

    def remove(self) -> None:
        """Removes it: the members are finished."""
        self._file.unlink(missing_ok=True)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> np.ndarray:
    """Returns an array as `np.savez` writes it, which knows no keys and no bfloat16."""
    data = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    return data.view(f"u{data.itemsize}") if data.dtype.kind == "V" else data


def _like(data: np.ndarray, leaf: Any) -> Array:
    if _is_key(leaf):
        value = jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))
    else:
        value = jnp.asarray(data.view(leaf.dtype))
    return jax.device_put(value, leaf.sharding)
