"""The factors of an adapter, and how the norm multiplies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax

from dora_jax.decomposition.axes import KernelAxes
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
    """

    axes: KernelAxes
    dtype: DTypeLike | None = None
    precision: lax.PrecisionLike = None

    @property
    def wide(self) -> jnp.dtype:
        """Float32, or the layer's dtype if that is wider."""
        return wide_dtype(jnp.float32 if self.dtype is None else self.dtype)

    def rounded(self, factor: Array) -> Array:
        """Returns a factor rounded to the layer's dtype, as the layer multiplies it, then wide."""
        return factor.astype(self.dtype).astype(self.wide)

    def with_kernel(self, a: Array, kernel: Array) -> Float[Array, "*stack r *out"]:
        """Returns `A^T W`."""
        letters, stack, inputs, outputs = self.axes.letters()
        return jnp.einsum(
            f"{stack}{inputs}y,{letters}->{stack}y{outputs}",
            a.astype(self.dtype),
            kernel.astype(self.dtype),
            precision=self.precision,
            preferred_element_type=self.wide,
        )

    def with_factors(self, a: Array, other: Array, b: Array) -> Float[Array, "*stack r *out"]:
        """Returns `(A^T A') B`."""
        _, stack, inputs, outputs = self.axes.letters()
        gram = jnp.einsum(f"{stack}{inputs}y,{stack}{inputs}z->{stack}yz", a, other)
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
