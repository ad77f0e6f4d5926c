"""`V = W0 + s A B` a few columns at a time, a small one whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.quantized import (
    Kernel,
    QuantizedKernel,
    dense,
    with_whole_scales,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Of a kernel's out axis in blocks of columns. The number of devices that cut it divides this, as a
# rule.
_PARTS = 64
# A `V` of at most so many entries (4 MB) is formed whole. A loop over its blocks would be compiled
# for each layer, forward and backward: four layers of SmolLM2 took 7.1 s, and 6.3 without loops.
_WHOLE = 2**20


class Block(NamedTuple):
    """A block of columns.

    Attributes:
      start: the first one in each part.
      seen: how many of each part are in the block before, too.
    """

    start: Array | np.int32
    seen: Array | np.int32


_FIRST = Block(np.int32(0), np.int32(0))


class Columns(NamedTuple):
    """How `V` is formed a few columns at a time, along the longest out axis of the kernel.

    A block has some columns of each part of the axis, not neighbours alone: where devices have a
    part each, or several, each device has its share of every block, and nothing is gathered.

    Attributes:
      product: how the layer multiplies.
      scaling: `s`.
      axis: which of the out axes.
      size: of that axis.
      parts: of the axis, of equal size.
      width: columns of a block in each part.
    """

    product: KernelProduct
    scaling: float
    axis: int
    size: int
    parts: int
    width: int

    @classmethod
    def of(cls, product: KernelProduct, scaling: float, kernel: Kernel, lora_b: Array) -> Columns:
        """Returns one block of a small `V`; of another blocks of about 32 columns.

        Of a rank above 32 there are as many columns as that; there are at least 8 blocks.
        """
        sizes = [kernel.shape[i] for i in product.axes.outputs]
        axis = sizes.index(max(sizes))
        if isinstance(kernel, jax.Array) and kernel.size <= _WHOLE:
            return cls(product, scaling, axis, sizes[axis], 1, sizes[axis])
        others = math.prod(sizes) // sizes[axis]
        rank = lora_b.shape[len(product.axes.stack)]
        most = max(min(math.ceil(sizes[axis] / 8), max(rank, 32) // others), 1)
        parts = math.gcd(sizes[axis], _PARTS)
        while parts > most:
            parts //= 2
        return cls(product, scaling, axis, sizes[axis], parts, most // parts)

    @property
    def length(self) -> int:
        """Number of columns of a block."""
        return self.parts * self.width

    @property
    def is_whole(self) -> bool:
        """Whether all columns are one block."""
        return self.length == self.size

    def each(self, step: Callable[[Block, Any], Any], carry: Any) -> Any:
        """Runs `carry = step(block, carry)` for each block; the last may overlap the one before."""
        if self.is_whole:
            return step(_FIRST, carry)
        size = self.size // self.parts

        def at(i: Array, carry: Any) -> Any:
            start = jnp.minimum(i * self.width, size - self.width)
            return step(Block(start, i * self.width - start), carry)

        return lax.fori_loop(0, math.ceil(size / self.width), at, carry)

    def take_along(self, x: Array, block: Block, axis: int, *, new: bool = False) -> Array:
        """Returns a block of an array along one of its axes.

        For a sum over all blocks take it `new`: zero in columns that an earlier block had.
        """
        if self.is_whole:
            return x
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = x.reshape(*before, self.parts, -1, *after)
        taken = lax.dynamic_slice_in_dim(x, block.start, self.width, axis + 1)
        if new and self.size // self.parts % self.width:
            is_new = jnp.arange(self.width) >= block.seen
            taken = jnp.where(is_new.reshape(-1, *(1,) * len(after)), taken, 0)
        return taken.reshape(*before, self.length, *after)

    def _columns_of(self, kernel: Kernel, block: Block, axis: int) -> Array:
        """Returns a block of a kernel; of a quantised one no more than that is dequantised."""
        if not isinstance(kernel, QuantizedKernel):
            return self.take_along(kernel, block, axis)
        own = with_whole_scales(kernel, axis)
        part = jax.tree.map(
            lambda x: x if x.shape[axis] == 1 else self.take_along(x, block, axis), own
        )
        # XLA would fuse `code * scale + x` into one operation, which does not round the product,
        # and the rounding is what is left where the sum nearly vanishes. A loop stands between; it
        # runs once, which XLA does not know.
        once = (block.start >= 0).astype(jnp.int32)
        empty = jnp.zeros(part.shape, part.dtype)
        return lax.fori_loop(0, once, lambda *_: dense(part), empty)

    def put_along(self, x: Array, values: Array, block: Block, axis: int) -> Array:
        """Returns the array with a block replaced along one of its axes."""
        if self.is_whole:
            return values
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        apart = x.reshape(*before, self.parts, -1, *after)
        values = values.reshape(*before, self.parts, self.width, *after)
        apart = lax.dynamic_update_slice_in_dim(apart, values, block.start, axis + 1)
        return apart.reshape(x.shape)

    def take(self, x: Array, block: Block, leading: int, *, new: bool = False) -> Array:
        """Returns a block of an array `(*stack, *leading, *out)`, as `take_along`."""
        axis = len(self.product.axes.stack) + leading + self.axis
        return self.take_along(x, block, axis, new=new)

    def put(self, x: Array, values: Array, block: Block, leading: int) -> Array:
        """Returns the array with a block replaced."""
        return self.put_along(x, values, block, len(self.product.axes.stack) + leading + self.axis)

    def selection(self, block: Block, shape: tuple[int, ...]) -> Float[Array, "columns *out"]:
        """Returns the matrix of 0 and 1 that puts a block's new columns in their places."""
        everywhere = 1 + jnp.arange(math.prod(shape))  # 0 is a column that an earlier block had
        own = self.take_along(everywhere.reshape(shape), block, self.axis, new=True)
        return (own.reshape(-1, 1) == everywhere).astype(self.product.wide).reshape(-1, *shape)

    def whole(
        self, kernel: Kernel, lora_a: Array, lora_b: Array
    ) -> Float[Array, "*stack *in *out"]:
        """Returns `V`, where it is one block."""
        return self.direction(_FIRST, kernel, lora_a, lora_b)

    def direction(
        self, block: Block, kernel: Kernel, lora_a: Array, lora_b: Array
    ) -> Float[Array, "*stack *in *columns"]:
        """Returns a block of `V`, in float32 or wider."""
        product, (stack, inputs, outputs) = self.product, self.product.axes
        w = self._columns_of(kernel, block, outputs[self.axis])
        w = jnp.transpose(w, stack + inputs + outputs)
        b = self.take(lora_b, block, 1)
        return product.rounded(w) + self.scaling * product.contract(
            "iy,yo->io", product.rounded(lora_a), product.rounded(b)
        )
