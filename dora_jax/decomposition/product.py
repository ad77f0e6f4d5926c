"""The factors of an adapter, and how the norm multiplies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.quantized import Kernel
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


class Factors(NamedTuple):
    """The low-rank factors with which a layer computes, see `effective_factors`."""

    a: Float[Array, "*stack *in k"]
    b: Float[Array, "*stack k *out"]


class KernelProduct(NamedTuple):
    """How the norm multiplies the factors with a kernel; hashable.

    Attributes:
      axes: the kernel's axes.
      dtype: the dtype in which the layer multiplies; None is the kernel's.
      precision: of the product with the kernel, as for `jax.lax.dot_general`.
      cut: inside `jax.shard_map`, the mesh axes that cut the kernel's in axes. What is summed over
        those is summed over the shards too.
    """

    axes: KernelAxes
    dtype: DTypeLike | None = None
    precision: lax.PrecisionLike = None
    cut: tuple[str, ...] = ()

    def over_shards(self, x: Array) -> Array:
        """Returns the sum over the shards of the in axes."""
        return lax.psum(x, self.cut) if self.cut else x

    @property
    def wide(self) -> jnp.dtype:
        """Float32, or the layer's dtype if that is wider."""
        return wide_dtype(jnp.float32 if self.dtype is None else self.dtype)

    def rounded(self, factor: Array) -> Array:
        """Returns a factor rounded to the layer's dtype, as the layer multiplies it, then wide."""
        return factor.astype(self.dtype).astype(self.wide)

    def with_kernel(self, a: Array, kernel: Kernel) -> Float[Array, "*stack r *out"]:
        """Returns `A^T W`."""
        letters, stack, inputs, outputs = self.axes.letters()
        y = jnp.einsum(
            f"{stack}{inputs}y,{letters}->{stack}y{outputs}",
            a.astype(self.dtype),
            kernel.astype(self.dtype),
            precision=self.precision,
            preferred_element_type=self.wide,
        )
        return self.over_shards(y)

    def tangent(self, factor: Array) -> Array:
        """Returns a factor's tangent as `rounded` does, but in float16 not rounded.

        Its transpose rounds the cotangent, which a scaled loss takes above float16's 65504.
        """
        return factor.astype(self.wide) if self.dtype == jnp.float16 else self.rounded(factor)

    def tangent_with_kernel(self, a: Array, kernel: Kernel) -> Float[Array, "*stack r *out"]:
        """Returns `A^T W` for a tangent of `A`, in float16 without rounding it, as `tangent`."""
        if self.dtype != jnp.float16:
            return self.with_kernel(a, kernel)
        stack, inputs, outputs = self.axes
        n = len(stack)
        contracted = (tuple(range(n, n + len(inputs))), inputs)
        y = lax.dot_general(  # of two dtypes, so that the kernel is not copied to float32
            a.astype(self.wide),
            kernel.astype(self.dtype),
            (contracted, (tuple(range(n)), stack)),
            precision=self.precision,
            preferred_element_type=self.wide,
        )
        order = [sorted(outputs).index(i) for i in outputs]
        return self.over_shards(jnp.transpose(y, (*range(n + 1), *(n + 1 + i for i in order))))

    def with_factors(self, a: Array, other: Array, b: Array) -> Float[Array, "*stack r *out"]:
        """Returns `(A^T A') B`."""
        _, stack, inputs, outputs = self.axes.letters()
        gram = jnp.einsum(f"{stack}{inputs}y,{stack}{inputs}z->{stack}yz", a, other)
        gram = self.over_shards(gram)
        return jnp.einsum(f"{stack}yz,{stack}z{outputs}->{stack}y{outputs}", gram, b)

    def sum_over_rank(self, x: Float[Array, "*stack r *out"]) -> Float[Array, "*stack *out"]:
        """Sums over r."""
        return jnp.sum(x, axis=len(self.axes.stack))

    def contract(self, equation: str, x: Array, y: Array) -> Array:
        """Returns an einsum exact in its dtype; `i` and `o` stand for all axes in and out.

        The stack is in front of every term.
        """
        _, stack, inputs, outputs = self.axes.letters()
        for letter, axes in (("i", inputs), ("o", outputs)):
            equation = equation.replace(letter, axes.upper())
        terms, result = equation.split("->")
        terms = ",".join(stack + term for term in terms.split(","))
        return jnp.einsum(f"{terms}->{stack}{result}", x, y, precision="highest")
