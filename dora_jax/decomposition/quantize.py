"""Kernels to the nearest codes of a format."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.quantized import (
    FORMATS,
    NF4,
    SCALE_BLOCK,
    QuantizedKernel,
    expanded,
    is_abstract,
    whole_scales,
)
from dora_jax.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How kernels are quantised.

    Attributes:
      format: "nf4", "int4", "int8" or "fp8" (e4m3).
      block: how many numbers share a scale along an in axis; by default 64 for nf4 and int4 (as
        QLoRA), and a whole column for int8 and fp8.
      double: whether the scales are quantised too, to 8 bits in blocks of 256 (QLoRA, section 3).

    Raises:
      ConfigError: the format is not known, or the block is no positive number.

    Example:
      >>> Quantization("nf4", double=True).block is None
      True
    """

    format: str
    block: int | None = None
    double: bool = False

    def __post_init__(self) -> None:
        known = [name for name in FORMATS if name != "uint4"]
        if self.format not in known:
            raise ConfigError(f"{self.format!r} is not a format to quantise to: {', '.join(known)}")
        if self.block is not None and (not isinstance(self.block, int) or self.block < 1):
            raise ConfigError(f"block must be a positive number of weights, got {self.block!r}")

    @classmethod
    def of(cls, given: str | Quantization) -> Quantization:
        """Returns the record for a format's name, or the record itself."""
        return given if isinstance(given, Quantization) else cls(given)


def quantize_kernel(
    kernel: Float[Array, "..."], quantization: str | Quantization, axes: KernelAxes
) -> QuantizedKernel:
    """Returns a kernel quantised to the nearest codes; scales from the largest absolute value.

    Args:
      kernel: in any dtype, which the dequantised kernel has too. From the shape of one comes the
        shape of the result.
      quantization: the format, or how to quantise to it.
      axes: of the kernel. Scales are shared along in axes: a block lies along the longest of them,
        a column along all.

    Example:
      >>> kernel = jnp.array([[1.0, 0.5], [-2.0, 0.25]])
      >>> quantize_kernel(kernel, "int8", KernelAxes((), (0,), (1,))).codes
      Array([[  64,  127],
             [-127,   64]], dtype=int8)
    """
    quantization = Quantization.of(quantization)
    if is_abstract(kernel):
        run = functools.partial(_quantize, quantization=quantization, axes=axes)
        return jax.eval_shape(run, kernel)
    return _quantize(kernel, quantization, axes)


def quantize_like(kernel: Float[Array, "..."], like: QuantizedKernel) -> QuantizedKernel:
    """Returns a kernel quantised as another one of the same shape was, which may be abstract.

    Which axes share a scale is seen from the shapes.
    """
    axes: dict[str, list[int]] = {"stack": [], "inputs": [], "outputs": []}
    for i, size in enumerate(like.shape):
        if like.scales.shape[i] != size:
            axes["inputs"].append(i)
        elif like.scale_mean is not None and like.scale_mean.shape[i] == size > 1:
            axes["stack"].append(i)
        else:
            axes["outputs"].append(i)
    double = like.scale_scales is not None
    how = Quantization(like.format, like.block, double)
    return quantize_kernel(kernel, how, KernelAxes(**{k: tuple(v) for k, v in axes.items()}))


@functools.partial(jax.jit, static_argnames=("quantization", "axes"))
def _quantize(kernel: Array, quantization: Quantization, axes: KernelAxes) -> QuantizedKernel:
    format, double = quantization.format, quantization.double
    own, wide = FORMATS[format], kernel.astype(jnp.float32)
    block = own.block if quantization.block is None else quantization.block
    shared = [i for i in axes.inputs if kernel.shape[i] > 1]
    if block is not None:
        shared = sorted(shared, key=lambda i: kernel.shape[i])[-1:]
    scales = jnp.abs(wide)
    for axis in shared:
        scales = _largest(scales, axis, block or kernel.shape[axis])
    scales = scales / own.largest
    others = [i for i in axes.inputs + axes.outputs if i not in shared]
    double_axis = max(others, key=lambda i: kernel.shape[i], default=-1)
    parts: dict[str, Any] = {}
    if double:
        scales, parts["scale_scales"], parts["scale_mean"] = _quantized_scales(
            scales, axes, double_axis
        )
    block = block or max((kernel.shape[i] for i in shared), default=1)
    divisor = whole_scales(scales, **parts)
    divisor = expanded(jnp.where(divisor == 0, 1, divisor), kernel.shape, block)
    codes = _codes(wide / divisor, format).astype(own.dtype)
    name = jnp.dtype(kernel.dtype).name
    return QuantizedKernel(codes, scales, **parts, format=format, block=block, dtype_name=name)


def _codes(x: Array, format: str) -> Array:
    """Returns the nearest codes of numbers that were divided by their scale."""
    if format == "nf4":
        middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
        return sum(
            ((x > middle).astype(jnp.uint8) for middle in middles), jnp.zeros(x.shape, jnp.uint8)
        )
    largest = FORMATS[format].largest
    x = jnp.clip(x, -largest, largest)
    return x if format == "fp8" else jnp.round(x).astype(jnp.int8)


def _quantized_scales(scales: Array, axes: KernelAxes, axis: int) -> tuple[Array, Array, Array]:
    """Returns scales in 8 bits, with the scales of blocks of them, and their mean."""
    own = tuple(i for i in range(scales.ndim) if i not in axes.stack)
    mean = jnp.mean(scales, own, keepdims=True)
    rest = scales - mean
    # In bfloat16 the product with a code is exact. So the sum with the mean is rounded once, and is
    # the same in every program, whether or not that fuses the two.
    of_blocks = (_largest(jnp.abs(rest), axis, SCALE_BLOCK) / 127).astype(jnp.bfloat16)
    divisor = of_blocks.astype(jnp.float32)
    divisor = expanded(jnp.where(divisor == 0, 1, divisor), scales.shape, SCALE_BLOCK)
    return jnp.round(rest / divisor).astype(jnp.int8), of_blocks, mean


def _largest(x: Array, axis: int, block: int) -> Array:
    """Returns the largest number of each block along an axis; the last block may be shorter."""
    size = x.shape[axis]
    padding = [(0, -size % block if i == axis % x.ndim else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding)
    before, after = x.shape[: axis % x.ndim], x.shape[axis % x.ndim + 1 :]
    return jnp.max(x.reshape(*before, -1, block, *after), len(before) + 1)
