"""Which layers of a model are quantised, and how: the same for both front ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.from_error import without_principal
from dora_jax.decomposition.quantize import Quantization, quantize_kernel
from dora_jax.decomposition.quantized import QuantizedKernel, is_abstract
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.layers.layout import Layout
from dora_jax.selection import all_linear_apart, match_modules

ADAPTED = (
    "the model is adapted already: quantise first, then apply_dora; the adapter belongs to the "
    "kernels that it was made for. Of adapters that are trained, merge them first"
)
Patterns = str | Sequence[str]


class Chosen(NamedTuple):
    """Which layers of a model to quantise, and how.

    Attributes:
      quantization: how.
      targets: names of layers or "all-linear", as in `DoRAConfig.target_modules`; None for all
        with a kernel.
      exclude: names of layers, or of modules that hold them, to leave as they are.
      principal_rank: how many directions of the largest singular values each kernel loses first.
    """

    quantization: Quantization
    targets: Patterns | None
    exclude: Patterns
    principal_rank: int = 0

    def paths(
        self,
        kernels: Mapping[Path, Any],
        layouts: Mapping[Path, Layout],
        modules: Iterable[Path],
    ) -> list[Path]:
        """Returns the paths of the layers to quantise; those that are quantised stay so.

        Args:
          kernels: the kernel of each layer whose layout is known.
          layouts: the layout of each.
          modules: the path of every module.

        Raises:
          ConfigError: a pattern matches nothing; names the nearest layers.
          AdapterError: no layer is left.
        """
        by_name = {".".join(path): path for path in kernels}
        names = set(by_name)
        if self.targets is not None:
            targets, all_linear = all_linear_apart(self.targets)
            names = match_modules(targets, by_name, "target_modules") if targets else set()
            if all_linear:
                names |= {name for name, path in by_name.items() if layouts[path].all_linear}
        if self.exclude:
            every = {".".join(path) for path in modules} | set(by_name)
            left_out = match_modules(self.exclude, every, "exclude_modules")
            names = {
                n for n in names if not any(n == out or n.startswith(f"{out}.") for out in left_out)
            }
        chosen = [by_name[n] for n in sorted(names)]
        chosen = [p for p in chosen if not isinstance(kernels[p], QuantizedKernel)]
        if not chosen:
            raise AdapterError(
                "no layer is left to quantise: those that are chosen are quantised already, or the "
                "model has none whose layout is known (dora.layers.register_layout)"
            )
        return chosen

    def quantized(
        self, path: Path, kernel: Any, layout: Layout, axes: KernelAxes
    ) -> QuantizedKernel:
        """Returns the quantised kernel of a layer; raises `AdapterError` if it is no float."""
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise AdapterError(
                f"{layer_name(path)}: its kernel is {kernel.dtype}, not of floating numbers: "
                "exclude_modules"
            )
        if self.principal_rank:
            if is_abstract(kernel):
                raise AdapterError(
                    f"{layer_name(path)}: principal_rank needs the kernel, and the model has "
                    "shapes alone: load it first, then quantise it"
                )
            kernel = without_principal(kernel, axes, self.principal_rank)
        return quantize_kernel(kernel, self.quantization, layout.shared_axes(axes))


def refuse_training_in_full(path: Path) -> AdapterError:
    """Returns the error for a quantised module in `modules_to_save`."""
    return AdapterError(
        f"{layer_name(path)} is in modules_to_save, and codes cannot be trained: leave it out of "
        "dora.quantize (exclude_modules)"
    )
