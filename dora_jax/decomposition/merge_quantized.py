"""The merged kernel of a quantised base: into which kernel, and what that loses."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import Adapter, KernelAxes
from dora_jax.decomposition.base import FrozenBase, describe_base
from dora_jax.decomposition.merge import materialize
from dora_jax.decomposition.quantize import quantize_like
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel, dense
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from dora_jax.config import LayerSettings

DEQUANTIZED, REQUANTIZED = "dequantized", "requantized"


@functools.partial(jax.jit, static_argnames=("settings", "axes"))
def merge_requantized(
    settings: LayerSettings,
    kernel: QuantizedKernel,
    adapter: Adapter,
    base: FrozenBase,
    axes: KernelAxes,
) -> tuple[QuantizedKernel, Float[Array, ""]]:
    """Returns the merged kernel in the format of its base, and the share of the change it loses."""
    merged = materialize(settings, kernel, adapter, base, axes, dtype=jnp.float32)
    new = quantize_like(merged.astype(kernel.dtype), kernel)
    return new, _lost(new.astype(jnp.float32), merged, kernel)


@functools.partial(jax.jit, static_argnames=("settings", "axes"))
def merge_into_original(
    settings: LayerSettings,
    kernel: Kernel,
    adapter: Adapter,
    base: FrozenBase,
    axes: KernelAxes,
    original: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Returns `m (W + s A B) / ||W + s A B||` of the original kernel `W`, and a difference.

    The difference is that from the model that was trained, as a share of the change it learnt.
    """
    trained = materialize(settings, kernel, adapter, base, axes, dtype=jnp.float32)
    own = describe_base(original, axes, settings.eps)
    own = dataclasses.replace(base, norm=own.norm, first_row=own.first_row)
    wide = wide_dtype(original.dtype)
    merged = materialize(settings, original, adapter, own, axes, dtype=wide)
    return merged.astype(original.dtype), _lost(merged.astype(jnp.float32), trained, kernel)


def _lost(found: Array, merged: Array, kernel: Kernel) -> Float[Array, ""]:
    """Returns `||found - merged|| / ||merged - W0||`, infinite where nothing was learnt."""
    change = jnp.linalg.norm((merged - dense(kernel).astype(jnp.float32)).ravel())
    return jnp.linalg.norm((found - merged).ravel()) / change


def check_original(path: Path, kernel: Any, original: Any) -> None:
    """Raises `AdapterError` if a kernel is not the original one of a quantised kernel."""
    wrong = original is None or isinstance(original, QuantizedKernel)
    if wrong or tuple(original.shape) != tuple(kernel.shape):
        raise AdapterError(
            f"{layer_name(path)}: what is given as the original has no unquantised kernel of shape "
            f"{tuple(kernel.shape)}: give the model, or the parameters, that were quantised"
        )


def report_loss(into: str, losses: Mapping[Path, Any], stacklevel: int = 3) -> None:
    """Warns what share of their change layers lose by the base that they are merged into."""
    shares = {p: float(s) for p, s in losses.items() if not isinstance(s, jax.core.Tracer)}
    if not shares:
        return
    worst = max(shares, key=lambda path: shares[path])
    mean = sum(shares.values()) / len(shares)
    what = {
        REQUANTIZED: "merging requantises the kernels",
        "original": "merging into the original kernels, on which the adapter was not trained",
    }[into]
    warnings.warn(
        f"{what}: the result differs from the model that was trained by {mean:.1%} of the change "
        f"that was learnt (mean of {len(shares)} layers; {layer_name(worst)} the most, "
        f"{shares[worst]:.1%}). into='dequantized' loses nothing but the rounding to their dtype",
        stacklevel=stacklevel,
    )
