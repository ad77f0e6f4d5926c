"""Adapter folders of either format, read without a model."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.adapters.groups import count_parameters
from dora_jax.adapters.trees import flatten, get_in
from dora_jax.checkpoint.adapters import SavedAdapters, read_adapters
from dora_jax.decomposition.base import FrozenBase
from dora_jax.errors import CheckpointError, Path
from dora_jax.peft import folder as files
from dora_jax.peft.config import FILE as PEFT_CONFIG
from dora_jax.peft.config import PeftConfig
from dora_jax.peft.keys import PREFIX

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# PEFT's tensors of one adapted module, and ours.
_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
}


@dataclasses.dataclass(frozen=True)
class LayerAdapter:
    """One layer's adapter, in float64, its axes joined to one of each kind.

    Attributes:
      path: dotted; of the Hugging Face module in a PEFT folder.
      rank, alpha, scaling: of the low-rank product.
      a, b: `(stack, in, r)` and `(stack, r, out)`; None for a magnitude alone, or where the shapes
        do not tell stack from rank.
      magnitude: in the shape it has in the file.
      norm: of the frozen kernel, where it is known.
      parameters: how many are trained.
      arrays: as they are in the file.
    """

    path: str
    rank: int
    alpha: float
    scaling: float
    a: Array | None
    b: Array | None
    magnitude: Array | None
    norm: Array | None
    parameters: int
    arrays: Mapping[str, Array]

    def product_norm(self) -> float | None:
        """Returns the Frobenius norm of `s A B`."""
        return None if self.a is None or self.b is None else self.scaling * norm_of(self.a, self.b)

    def drift(self) -> tuple[float, float] | None:
        """Returns mean and largest `|m - ||W0||| / ||W0||`; None where it is not known."""
        if self.magnitude is None or self.norm is None or not (moved := self.norm != 0).any():
            return None
        change = np.abs(self.magnitude - self.norm)[moved] / self.norm[moved]
        return float(change.mean()), float(change.max())


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What a folder holds.

    Attributes:
      path: of the folder.
      format: "orbax" or "peft".
      version: of the dora_jax that wrote it, if one did.
      config: the configuration as plain JSON types.
      layers: the adapted layers, in order of their paths.
      saved: arrays of modules trained in full, by dotted path.
      bytes: of all its files.
    """

    path: str
    format: str
    version: str | None
    config: dict[str, Any]
    layers: list[LayerAdapter]
    saved: Mapping[str, Array]
    bytes: int

    def counts(self) -> dict[str, int]:
        """Returns how many parameters of each kind are trained, and in all."""
        tree: dict[str, Any] = {layer.path: dict(layer.arrays) for layer in self.layers}
        counts = count_parameters(tree) if tree else {"saved": 0, "total": 0}
        saved = sum(x.size for x in self.saved.values())
        return {**counts, "saved": saved, "total": counts["total"] + saved}


def folder_format(folder: str | pathlib.Path) -> str:
    """Returns "peft" or "orbax".

    Raises:
      CheckpointError: there is no such folder.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    return "peft" if (path / PEFT_CONFIG).is_file() else "orbax"


def read_folder(folder: str | pathlib.Path) -> AdapterFolder:
    """Reads an adapter folder of either format.

    Raises:
      DoRAError: it is damaged, incomplete, or of neither format; names file or array.
    """
    path = pathlib.Path(folder)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if folder_format(path) == "peft":
        return _from_peft(path, size)
    return _from_orbax(path, read_adapters(path), size)


def norm_of(a: Array, b: Array) -> float:
    """Returns `||A B||` without forming the product, which may be as large as the kernel.

    Example:
      >>> round(norm_of(np.full((1, 3, 1), 2.0), np.full((1, 1, 12), 0.5)), 9)
      6.0
    """
    return float(np.linalg.norm(np.linalg.qr(a, mode="r") @ b))


def _from_orbax(path: pathlib.Path, saved: SavedAdapters, size: int) -> AdapterFolder:
    flat = flatten(saved.adapters)
    names = ("lora_a", "lora_b", "magnitude")
    layers: dict[Path, dict[str, Array]] = {}
    for p, x in flat.items():
        if p[-1] in names:
            layers.setdefault(p[:-1], {})[p[-1]] = x
    rest = {".".join(p): x for p, x in flat.items() if p[:-1] not in layers}
    rows = []
    for p, arrays in sorted(layers.items()):
        settings, base = saved.config.layer_settings(p), saved.base.get(p)
        a, b = _joined(arrays, base, stack_axes(saved, p))
        rows.append(
            LayerAdapter(
                ".".join(p),
                settings.rank,
                settings.alpha,
                settings.scaling,
                a,
                b,
                _float64(arrays.get("magnitude")),
                _float64(None if base is None else base.norm),
                sum(x.size for x in arrays.values()),
                arrays,
            )
        )
    config = saved.config.to_dict()
    return AdapterFolder(str(path), "orbax", saved.version, config, rows, rest, size)


def _from_peft(path: pathlib.Path, size: int) -> AdapterFolder:
    config, tensors = files.read(path)
    layers: dict[str, dict[str, Array]] = {}
    rest = {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        if part is None:
            rest[name] = x
        else:
            layers.setdefault(name.removesuffix(f".{part}"), {})[_PARTS[part]] = x
    rows = [_peft_layer(config, name, arrays) for name, arrays in sorted(layers.items())]
    fields = dataclasses.asdict(config)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    return AdapterFolder(str(path), "peft", None, fields, rows, rest, size)


def _peft_layer(config: PeftConfig, name: str, arrays: dict[str, Array]) -> LayerAdapter:
    if not {"lora_a", "lora_b"} <= arrays.keys():
        raise CheckpointError(f"{PREFIX}{name}: lora_A or lora_B is missing: fetch the file again")
    rank, alpha = config.rank(name), config.alpha(name)
    a, b = (_float64(arrays[key]) for key in ("lora_a", "lora_b"))
    assert a is not None and b is not None
    if a.shape[0] != rank or b.size % rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{PREFIX}{name}: lora_A is {a.shape} and lora_B {b.shape}, but {PEFT_CONFIG} makes "
            f"the rank {rank}: the two files do not belong together"
        )
    return LayerAdapter(
        name,
        rank,
        alpha,
        alpha / (math.sqrt(rank) if config.use_rslora else rank),
        a.reshape(rank, -1).T[None],
        b.reshape(-1, rank).T[None],
        _float64(arrays.get("magnitude")),
        None,
        sum(x.size for x in arrays.values()),
        arrays,
    )


def _joined(
    arrays: Mapping[str, Array], base: FrozenBase | None, axis: int | None
) -> tuple[Array | None, Array | None]:
    """Returns the factors as they act, `(stack, in, r)` and `(stack, r, out)`."""
    if "lora_a" not in arrays:
        return None, None
    a, b = (_float64(arrays[name]) for name in ("lora_a", "lora_b"))
    assert a is not None and b is not None
    if axis is None:
        return None, None
    if base is not None and base.init_a is not None:
        a = np.concatenate([a, np.float64(base.init_a)], axis=-1)
        b = np.concatenate([b, -np.float64(base.init_b)], axis=axis)
    stack = math.prod(a.shape[:axis])
    return a.reshape(stack, -1, a.shape[-1]), b.reshape(stack, b.shape[axis], -1)


def stack_axes(saved: SavedAdapters, path: Path) -> int | None:
    """Returns how many stack axes lead a layer's arrays; None if nothing in the folder says so.

    A folder that was saved with its model says it. Without, two axes of `lora_a` leave no stack.
    """
    if path in saved.axes:
        return len(saved.axes[path].stack)
    arrays = get_in(saved.adapters, path, "the adapters")
    return 0 if all(np.ndim(arrays[n]) == 2 for n in ("lora_a", "lora_b") if n in arrays) else None


def _float64(x: Any) -> Array | None:
    return None if x is None else np.asarray(x).astype(np.float64)
