"""Quantised kernels: codes of 4 or 8 bits in the kernel's shape, with scales per column or block.

A dequantised kernel is computed where it is used and dropped again, so that it never lies in memory
for more than a layer. Where XLA can, it computes it inside the product: on a TPU from int8, fp8,
int4 and uint4 codes, not from bytes that hold two codes each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import jax
import jax.numpy as jnp

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
      scale_scales: bfloat16, of quantised scales, in blocks of 256 along the longest axis that is
        not blocked itself; else None.
      scale_mean: float32, what was subtracted from quantised scales; else None.
      format: a key of `FORMATS`.
      block: how many codes share a scale along a blocked axis.
      dtype_name: of the dequantised kernel.

    Example:
      >>> from dora_jax.decomposition import KernelAxes, quantize_kernel
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
    def sharding(self) -> Any:
        """Of the codes, which lie as the kernel would."""
        return self.codes.sharding

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

    def astype(self, dtype: DTypeLike | None) -> Array:
        """Returns the dequantised kernel in another dtype."""
        return self.dequantize().astype(self.dtype if dtype is None else dtype)

    def dequantize(self) -> Float[Array, "..."]:
        """Returns `code * scale + offset`, computed in float32, in the kernel's own dtype."""
        scales = whole_scales(self.scales, self.scale_scales, self.scale_mean)
        values = _nf4_values(self.codes) if self.format == "nf4" else _as_float(self.codes)
        kernel = values * expanded(scales, self.shape, self.block)
        if self.offsets is not None:
            kernel = kernel + expanded(self.offsets, self.shape, self.block)
        return kernel.astype(self.dtype)


# A frozen kernel. What computes with it asks for `dense(kernel)`, or only for shape and dtype.
Kernel: TypeAlias = Union["Array", QuantizedKernel]


def dense(kernel: Kernel) -> Array:
    """Returns a kernel as an array, dequantised if it is quantised."""
    return kernel.dequantize() if isinstance(kernel, QuantizedKernel) else kernel


def with_whole_scales(kernel: QuantizedKernel, axis: int) -> QuantizedKernel:
    """Returns the same kernel with a scale for each index of an axis, or one for all; float32."""
    scales = whole_scales(kernel.scales, kernel.scale_scales, kernel.scale_mean)
    shape = [n if i == axis else scales.shape[i] for i, n in enumerate(kernel.shape)]

    def whole(x: Array) -> Array:
        return x if x.shape[axis] == 1 else expanded(x, shape, kernel.block)

    offsets = None if kernel.offsets is None else whole(kernel.offsets)
    return dataclasses.replace(
        kernel, scales=whole(scales), offsets=offsets, scale_scales=None, scale_mean=None
    )


def leading_part(kernel: QuantizedKernel, axes: Sequence[int]) -> QuantizedKernel:
    """Returns the kernel at the first block of some axes, to take index 0 of it.

    A row of 4-bit codes is no whole number of a TPU's tiles: to take it XLA copies all codes first,
    17 MB of reading and writing for a kernel of 4096 x 4096. A block is one.
    """
    shape = kernel.shape
    number = {axis: min(shape[axis], kernel.block, BLOCK) for axis in axes}

    def part(x: Array) -> Array:
        is_code = x.shape == shape
        index = [
            slice(number[i] if is_code else 1) if i in number else slice(None)
            for i in range(x.ndim)
        ]
        return x[tuple(index)]

    return jax.tree.map(part, kernel)


def is_abstract(kernel: Any) -> bool:
    """Returns whether a kernel is only the shape of one."""
    return isinstance(jax.tree.leaves(kernel)[0], jax.ShapeDtypeStruct)


def abstract_dense(kernel: Any) -> Any:
    """Returns a quantised kernel as the shape of the dequantised one; any other as it is."""
    if isinstance(kernel, QuantizedKernel):
        return jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    return kernel


def whole_scales(
    scales: Array, scale_scales: Array | None = None, scale_mean: Array | None = None
) -> Array:
    """Returns scales in float32, dequantised if they are quantised."""
    if scale_scales is None or scale_mean is None:
        return scales
    of_blocks = expanded(scale_scales.astype(jnp.float32), scales.shape, SCALE_BLOCK)
    return scales.astype(jnp.float32) * of_blocks + scale_mean


def expanded(scales: Array, shape: Sequence[int], block: int) -> Array:
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
