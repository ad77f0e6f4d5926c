"""The merged kernel: the only place where an array as large as the kernel is formed."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dora_jax.decomposition.axes import (
    Adapter,
    KernelAxes,
    canonical_transpose,
    expand_inputs,
)
from dora_jax.decomposition.base import FrozenBase, kernel_norm
from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.quantized import Kernel
from dora_jax.decomposition.scale import effective_factors, magnitude_over_norm
from dora_jax.errors import AdapterError, Path, layer_name, listing
from dora_jax.ops.mesh_types import automatically, explicit_mesh
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    from dora_jax.config import LayerSettings


def materialize(
    settings: LayerSettings,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
    axes: KernelAxes,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Returns the merged kernel `m (W0 + s A B) / n` in the shape and dtype of `kernel`.

    Computed in float32 or wider. It is the kernel itself, bit for bit, while the adapter is
    untrained. `dtype` is that of the result, if not the kernel's.
    """
    letters, stack, inputs, outputs = axes.letters()
    wide = merged = kernel.astype(wide_dtype(kernel.dtype))
    if settings.rank:
        a, b = (x.astype(merged.dtype) for x in effective_factors(adapter, base, axes))
        delta = jnp.einsum(
            f"{stack}{inputs}y,{stack}y{outputs}->{letters}", a, b, precision="highest"
        )
        merged = merged + settings.scaling * delta
    if settings.decompose:
        norm = None
        if settings.normalize and settings.rank:
            moved = canonical_transpose(jnp.any(merged != wide, axes.inputs), axes)
            own = jnp.maximum(kernel_norm(merged, axes), settings.eps)
            norm = jnp.where(moved, own, base.norm)
        product = KernelProduct(axes)
        scale = magnitude_over_norm(settings, kernel, adapter, base, product, norm)
        merged = expand_inputs(scale, axes) * merged
    return merged.astype(kernel.dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames=("settings", "axes"))
def merge_kernel(
    settings: LayerSettings,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
    axes: KernelAxes,
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Returns the merged kernel and its rounding loss.

    The loss is the share of the change that the kernel's dtype rounds away,
    `||rounded - W'|| / ||W' - W0||`, in float32 or wider. It is 0 where the kernel did not change,
    apart from rounding.
    """
    if explicit_mesh(kernel) is not None:
        own = jax.typeof(kernel).sharding
        out = (own, NamedSharding(own.mesh, PartitionSpec()))
        run = functools.partial(_merge, settings, axes)
        return cast("tuple[Array, Array]", automatically(run, out, kernel, dict(adapter), base))
    return _merge(settings, axes, kernel, adapter, base)


def _merge(
    settings: LayerSettings, axes: KernelAxes, kernel: Kernel, adapter: Adapter, base: FrozenBase
) -> tuple[Array, Array]:
    exact = materialize(settings, kernel, adapter, base, axes, dtype=wide_dtype(kernel.dtype))
    rounded = exact.astype(kernel.dtype)
    wide = kernel.astype(exact.dtype)
    error, change, whole = (
        jnp.linalg.norm(x.ravel())
        for x in (exact - rounded.astype(exact.dtype), exact - wide, wide)
    )
    unchanged = change <= 1e-6 * whole
    return rounded, jnp.where(unchanged, 0, error / jnp.where(unchanged, 1, change))


def check_rounding(rounding_losses: Mapping[Path, Any], stacklevel: int = 3) -> None:
    """Warns which share of their change layers lose to the kernels' dtype in a merge.

    Raises:
      AdapterError: merged kernels are above the largest number of their dtype; names the layers.
    """
    shares = {p: float(s) for p, s in rounding_losses.items() if not isinstance(s, jax.core.Tracer)}
    if lost := [layer_name(path) for path, share in shares.items() if not math.isfinite(share)]:
        raise AdapterError(
            f"{listing(lost)}: the merged kernel does not fit into the kernel's dtype: keep the "
            "adapters, or merge into float32 kernels"
        )
    rounded = {path: share for path, share in shares.items() if share > 1e-3}
    if rounded:
        worst = max(rounded, key=lambda path: rounded[path])
        warnings.warn(
            f"merging rounds to the kernels' dtype: {len(rounded)} of {len(shares)} layers lose "
            f"some of their change, {layer_name(worst)} the most ({rounded[worst]:.1%}). Where "
            "that is too much, keep the adapters, or merge into float32 kernels",
            stacklevel=stacklevel,
        )
