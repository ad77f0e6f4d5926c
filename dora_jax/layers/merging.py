"""How each layer of a model is merged: into which base, and what that loses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import Adapter, KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.decomposition.merge import check_rounding, merge_kernel
from dora_jax.decomposition.merge_quantized import (
    DEQUANTIZED,
    REQUANTIZED,
    check_original,
    merge_into_original,
    merge_requantized,
    report_loss,
)
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel
from dora_jax.errors import AdapterError, Path

if TYPE_CHECKING:
    from jaxtyping import Array


class LayerMerge(NamedTuple):
    """A layer to be merged: its path, settings, and the axes of its stored kernel."""

    path: Path
    settings: LayerSettings
    axes: KernelAxes


@dataclasses.dataclass
class Losses:
    """Merges the layers of a model, and keeps what each loses.

    Attributes:
      into: "dequantized", "requantized", or where the original kernels are.
      rounding: by path, what a kernel's dtype rounds away.
      base: by path, how far the result is from what was trained, of layers that are not merged
        into the kernel that they were trained on.
    """

    into: Any = DEQUANTIZED
    rounding: dict[Path, Any] = dataclasses.field(default_factory=dict)
    base: dict[Path, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.into, str) and self.into not in (DEQUANTIZED, REQUANTIZED):
            raise AdapterError(
                f"into={self.into!r}: give {DEQUANTIZED!r}, {REQUANTIZED!r}, or what was quantised"
            )

    def merged(
        self,
        layer: LayerMerge,
        kernel: Kernel,
        adapter: Adapter,
        base: FrozenBase,
        original: Array | None,
    ) -> Kernel:
        """Returns the merged kernel of a layer."""
        path, settings, axes = layer
        if self.into == DEQUANTIZED or not isinstance(kernel, QuantizedKernel):
            new, self.rounding[path] = merge_kernel(settings, kernel, adapter, base, axes)
            return new
        if self.into == REQUANTIZED:
            result, self.base[path] = merge_requantized(settings, kernel, adapter, base, axes)
            return result
        check_original(path, kernel, original)
        assert original is not None
        new, self.base[path] = merge_into_original(settings, kernel, adapter, base, axes, original)
        return new

    def report(self) -> None:
        """Warns of what layers lose; raises `AdapterError` if a kernel is not finite."""
        check_rounding(self.rounding, stacklevel=4)
        if self.base:
            kind = REQUANTIZED if self.into == REQUANTIZED else "original"
            report_loss(kind, self.base, stacklevel=4)
