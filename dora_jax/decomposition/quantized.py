"""Quantised kernels: codes of 4 or 8 bits in the kernel's shape, with scales per column or block.

A dequantised kernel is computed where it is used and dropped again, so that it never lies in memory
for more than a layer. Where XLA can, it computes it inside the product: on a TPU from int8, fp8,
int4 and uint4 codes, not from bytes that hold two codes each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Num

# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution, 0 among them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# How many numbers share a scale along an in axis, and how many scales share one of theirs.
BLOCK, SCALE_BLOCK = 64, 256


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of codes.

    Attributes:
      dtype: of the codes.
      largest: the largest absolute value of a code, which the largest number of a block gets.
      block: how many numbers share a scale, unless told otherwise; None for a whole column.
    """

    dtype: Any
    largest: float
    block: int | None


# Of "uint4" are only kernels that others quantised, with an offset for each block.
FORMATS = {
    "nf4": Format(jnp.uint4, 1.0, BLOCK),
    "int4": Format(jnp.int4, 7.0, BLOCK),
    "int8": Format(jnp.int8, 127.0, None),
    "fp8": Format(jnp.float8_e4m3fn, 448.0, None),
    "uint4": Format(jnp.uint4, 15.0, 32),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A kernel as codes and scales: a pytree that stands where the kernel stood.

    Each array has as many axes as the kernel, and whole stack axes: a scan takes a layer's part of
    each at the same position. In other axes a scale stands for `block` codes, or for all of them
    where its axis has size 1.

    Attributes:
      codes: in the kernel's shape; uint4 for nf4, else int4, int8, or float8_e4m3fn.
      scales: float32; int8 where they are quantised too.
      offsets: added to scaled codes, in the shape of the scales; None as a rule.
      scale_scales: bfloat16, of quantised scales, in blocks of 256 along the last axis that is not
        blocked itself; else None.
      scale_mean: float32, what was subtracted from quantised scales; else None.
      format: a key of `FORMATS`.
      block: how many codes share a scale along a blocked axis.
      dtype_name: of the dequantised kernel.

    Example:
      >>> kernel = jax.random.normal(jax.random.key(0), (128, 8))
      >>> quantized = quantize_kernel(kernel, "nf4", KernelAxes((), (0,), (1,)))
      >>> quantized.codes.dtype, quantized.scales.shape, quantized.bits
      (dtype(uint4), (2, 8), 4.5)
    """

    codes: Num[Array, "..."]
    scales: Num[Array, "..."]
    offsets: Float[Array, "..."] | None = None
    scale_scales: Float[Array, "..."] | None = None
    scale_mean: Float[Array, "..."] | None = None
    format: str = dataclasses.field(default="nf4", metadata={"static": True})
    block: int = dataclasses.field(default=BLOCK, metadata={"static": True})
    dtype_name: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The kernel's number of weights."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantised kernel."""
        return jnp.dtype(self.dtype_name)

    @property
    def bits(self) -> float:
        """Bits for each weight, scales included."""
        arrays = jax.tree.leaves(self)
        return sum(x.size * _bits(x.dtype) for x in arrays) / max(self.size, 1)

    def __getitem__(self, index: Any) -> Array:
        """Returns a part of the dequantised kernel; `[...]` is all of it, as Flax's layers ask."""
        whole = self.dequantize()
        return whole if index is ... else whole[index]

    def __jax_array__(self) -> Array:
        """Returns the dequantised kernel."""
        return self.dequantize()

    def astype(self, dtype: DTypeLike) -> Array:
        """Returns the dequantised kernel in another dtype."""
        return self.dequantize().astype(dtype)

    def dequantize(self) -> Float[Array, "..."]:
        """Returns `code * scale + offset`, computed in float32, in the kernel's own dtype."""
        scales = _whole_scales(self.scales, self.scale_scales, self.scale_mean)
        values = _nf4_values(self.codes) if self.format == "nf4" else _as_float(self.codes)
        kernel = values * _expanded(scales, self.shape, self.block)
        if self.offsets is not None:
            kernel = kernel + _expanded(self.offsets, self.shape, self.block)
        return kernel.astype(self.dtype)


# A frozen kernel. What computes with it asks for `dense(kernel)`, or only for shape and dtype.
Kernel: TypeAlias = Union["Array", QuantizedKernel]


def dense(kernel: Kernel) -> Array:
    """Returns a kernel as an array, dequantised if it is quantised."""
    return kernel.dequantize() if isinstance(kernel, QuantizedKernel) else kernel


def quantize_kernel(
    kernel: Float[Array, "..."],
    format: str,
    axes: KernelAxes,
    *,
    block: int | None = None,
    double: bool = False,
) -> QuantizedKernel:
    """Returns a kernel quantised to the nearest codes; scales from the largest absolute value.

    Args:
      kernel: in any dtype, which the dequantised kernel has too.
      format: "nf4", "int4", "int8" or "fp8" (e4m3).
      axes: of the kernel. Scales are shared along in axes: a block lies along the longest of them,
        a column along all.
      block: how many numbers share a scale; by default 64 for nf4 and int4 (as QLoRA), and a whole
        column for int8 and fp8.
      double: whether the scales are quantised too, to 8 bits in blocks of 256 (QLoRA, section 3).

    Raises:
      ConfigError: the format is not known, or the block is no positive number.

    Example:
      >>> kernel = jnp.array([[1.0, 0.5], [-2.0, 0.25]])
      >>> quantize_kernel(kernel, "int8", KernelAxes((), (0,), (1,))).codes
      Array([[  64,  127],
             [-127,   64]], dtype=int8)
    """
    own = check_format(format, block)
    block = own.block if block is None else block
    return _quantize(kernel, format, axes, block, double)


def check_format(format: str, block: int | None) -> Format:
    """Returns a format to quantise to; raises `ConfigError` if there is none of that name."""
    known = [name for name in FORMATS if name != "uint4"]
    if format not in known:
        raise ConfigError(f"{format!r} is not a format to quantise to: {', '.join(known)}")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ConfigError(f"block must be a positive number of weights, got {block!r}")
    return FORMATS[format]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
    kernel: Array, format: str, axes: KernelAxes, block: int | None, double: bool
) -> QuantizedKernel:
    own, wide = FORMATS[format], kernel.astype(jnp.float32)
    shared = [i for i in axes.inputs if kernel.shape[i] > 1]
    if block is not None:
        shared = sorted(shared, key=lambda i: kernel.shape[i])[-1:]
    scales = jnp.abs(wide)
    for axis in shared:
        scales = _largest(scales, axis, block or kernel.shape[axis])
    scales = scales / own.largest
    double_axis = max((i for i in axes.inputs + axes.outputs if i not in shared), default=-1)
    parts: dict[str, Any] = {}
    if double:
        scales, parts["scale_scales"], parts["scale_mean"] = _quantized_scales(
            scales, axes, double_axis
        )
    block = block or max((kernel.shape[i] for i in shared), default=1)
    divisor = _whole_scales(scales, **parts)
    divisor = _expanded(jnp.where(divisor == 0, 1, divisor), kernel.shape, block)
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
    divisor = _expanded(jnp.where(divisor == 0, 1, divisor), scales.shape, SCALE_BLOCK)
    return jnp.round(rest / divisor).astype(jnp.int8), of_blocks, mean


def _largest(x: Array, axis: int, block: int) -> Array:
    """Returns the largest number of each block along an axis; the last block may be shorter."""
    size = x.shape[axis]
    padding = [(0, -size % block if i == axis % x.ndim else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding)
    before, after = x.shape[: axis % x.ndim], x.shape[axis % x.ndim + 1 :]
    return jnp.max(x.reshape(*before, -1, block, *after), len(before) + 1)


def _whole_scales(
    scales: Array, scale_scales: Array | None = None, scale_mean: Array | None = None
) -> Array:
    """Returns scales in float32, dequantised if they are quantised."""
    if scale_scales is None or scale_mean is None:
        return scales
    of_blocks = _expanded(scale_scales.astype(jnp.float32), scales.shape, SCALE_BLOCK)
    return scales.astype(jnp.float32) * of_blocks + scale_mean


def _expanded(scales: Array, shape: Sequence[int], block: int) -> Array:
    """Returns what stands for blocks of an array in the array's shape, or one that broadcasts."""
    for axis, size in enumerate(shape):
        if scales.shape[axis] not in (1, size):
            scales = jnp.repeat(scales, block, axis)
            if scales.shape[axis] != size:
                scales = jax.lax.slice_in_dim(scales, 0, size, axis=axis)
    return scales


def _as_float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


def _nf4_values(codes: Array) -> Array:
    """Returns the numbers of nf4 codes, as a tree of selects on their bits.

    XLA:TPU computes it inside a product: 41 MB are read for a kernel of 4096 x 11008, where a
    lookup in the table writes the whole dequantised kernel first.
    """
    wide = codes.astype(jnp.int32)
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (wide >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]


def _bits(dtype: Any) -> int:
    return 4 if dtype in (jnp.uint4, jnp.int4) else 8 * jnp.dtype(dtype).itemsize
