"""Adapter folders of either format, read without a model."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_jax.adapters.groups import ADAPTER_ARRAYS, count_parameters
from dora_jax.adapters.trees import flatten
from dora_jax.checkpoint.saved import SavedAdapters, read_adapters
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.disk.json_file import is_file, is_folder, shown
from dora_jax.errors import AdapterError, CheckpointError, Path, layer_name
from dora_jax.peft import folder as files
from dora_jax.peft.config import FILE as PEFT_CONFIG
from dora_jax.peft.config import PeftConfig
from dora_jax.peft.keys import ModuleTensors, group_tensors
from dora_jax.selection import is_in_saved_module

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class LayerAdapter:
    """One layer's adapter, its axes of each kind flattened into one.

    Attributes:
      path: dotted; in a PEFT folder, of the Hugging Face module.
      rank, alpha, scaling: of the low-rank product.
      a, b: float64, `(stack, in, r)` and `(stack, r, out)`; None for a magnitude alone.
      magnitude: float64, in the shape it has in the file.
      norm: of the frozen kernel, float64; None where it is not known.
      arrays: as they are in the file, by name.
    """

    path: str
    rank: int
    alpha: float
    scaling: float
    a: Array | None
    b: Array | None
    magnitude: Array | None
    norm: Array | None
    arrays: Mapping[str, Array]

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(x.size for x in self.arrays.values())

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
    """The contents of an adapter folder.

    Attributes:
      path: of the folder.
      format: "orbax" or "peft".
      version: of the dora_jax that wrote it; None if PEFT did.
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
    if not is_folder(path):
        raise CheckpointError(f"{shown(path)} is not a folder")
    return "peft" if os.path.lexists(path / PEFT_CONFIG) else "orbax"


def read_folder(folder: str | pathlib.Path) -> AdapterFolder:
    """Reads an adapter folder of either format.

    Raises:
      DoRAError: it is damaged, incomplete, or of neither format; names file or array.
    """
    path = pathlib.Path(folder)
    kind = folder_format(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if is_file(file))
    if kind == "peft":
        return _from_peft(path, size)
    return _from_orbax(path, read_adapters(path), size)


def norm_of(a: Array, b: Array) -> float:
    """Returns `||A B||` without forming the product, which may be as large as the kernel.

    Example:
      >>> round(norm_of(np.full((1, 3, 1), 2.0), np.full((1, 1, 12), 0.5)), 9)
      6.0
    """
    return float(np.linalg.norm(np.linalg.qr(a, mode="r") @ b))


def layer_arrays(saved: SavedAdapters) -> tuple[dict[Path, dict[str, Array]], dict[Path, Array]]:
    """Returns the arrays of every adapted layer by path and name, and all others by path."""
    flat = flatten(saved.adapters)
    layers: dict[Path, dict[str, Array]] = {}
    for path, x in sorted(flat.items()):
        if path[-1] in ADAPTER_ARRAYS and not is_in_saved_module(saved.config, path):
            layers.setdefault(path[:-1], {})[path[-1]] = x
    return layers, {path: x for path, x in flat.items() if path[:-1] not in layers}


def kernel_axes(saved: SavedAdapters, path: Path, arrays: Mapping[str, Array]) -> KernelAxes:
    """Returns the axes of a layer's kernel.

    Adapters that were saved without their model do not tell them, unless there are only two.

    Raises:
      AdapterError: the axes are not known; names the layer.
    """
    if path in saved.axes:
        return saved.axes[path]
    if arrays["lora_a"].ndim == arrays["lora_b"].ndim == 2:
        return KernelAxes((), (0,), (1,))
    raise AdapterError(
        f"{layer_name(path)}: the adapters were saved without their model, so it is not known "
        "which of its axes are stack, in or out axes: save them with it, save(path, model, ...)"
    )


def _from_orbax(path: pathlib.Path, saved: SavedAdapters, size: int) -> AdapterFolder:
    layers, rest = layer_arrays(saved)
    rows = []
    for layer_path, arrays in layers.items():
        settings, base = saved.config.layer_settings(layer_path), saved.base.get(layer_path)
        a, b = _factors(saved, layer_path, arrays, base)
        rows.append(
            LayerAdapter(
                path=".".join(layer_path),
                rank=settings.rank,
                alpha=settings.alpha,
                scaling=settings.scaling,
                a=a,
                b=b,
                magnitude=_float64(arrays.get("magnitude")),
                norm=_float64(None if base is None else base.norm),
                arrays=arrays,
            )
        )
    others = {".".join(name): x for name, x in rest.items()}
    config = saved.config.to_dict()
    return AdapterFolder(str(path), "orbax", saved.version, config, rows, others, size)


def _from_peft(path: pathlib.Path, size: int) -> AdapterFolder:
    config, tensors = files.read(path)
    adapters, others = group_tensors(config, tensors)
    rows = [_peft_layer(config, adapter) for _, adapter in sorted(adapters.items())]
    fields = dataclasses.asdict(config)
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    return AdapterFolder(str(path), "peft", None, fields, rows, others, size)


def _peft_layer(config: PeftConfig, adapter: ModuleTensors) -> LayerAdapter:
    rank, alpha = config.rank(adapter.module), config.alpha(adapter.module)
    arrays = adapter.arrays
    return LayerAdapter(
        path=adapter.module,
        rank=rank,
        alpha=alpha,
        scaling=alpha / (math.sqrt(rank) if config.use_rslora else rank),
        a=arrays["lora_a"].astype(np.float64).reshape(rank, -1).T[None],
        b=arrays["lora_b"].astype(np.float64).reshape(-1, rank).T[None],
        magnitude=_float64(arrays.get("magnitude")),
        norm=None,
        arrays=arrays,
    )


def _factors(
    saved: SavedAdapters, path: Path, arrays: Mapping[str, Array], base: FrozenBase | None
) -> tuple[Array | None, Array | None]:
    """Returns the factors of the change `A B - A0 B0`: `(stack, in, r)` and `(stack, r, out)`."""
    if "lora_a" not in arrays:
        return None, None
    stack = len(kernel_axes(saved, path, arrays).stack)
    a, b = (arrays[name].astype(np.float64) for name in ("lora_a", "lora_b"))
    if base is not None and base.init_a is not None:
        a = np.concatenate([a, np.float64(base.init_a)], axis=-1)
        b = np.concatenate([b, -np.float64(base.init_b)], axis=stack)
    slices = math.prod(a.shape[:stack])
    return a.reshape(slices, -1, a.shape[-1]), b.reshape(slices, b.shape[stack], -1)


def _float64(x: Any) -> Array | None:
    return None if x is None else np.asarray(x).astype(np.float64)
