"""What an adapted layer keeps of its frozen kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.decomposition.axes import KernelAxes, canonical_transpose
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel, dense, leading_part
from dora_jax.decomposition.sharding import explicit_shardings
from dora_jax.errors import AdapterError, Path, layer_name
from dora_jax.ops.mesh_types import automatically
from dora_jax.ops.output_scale import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Shaped

# How far a kernel may be from the one the adapter was made for: far enough for a cast to bfloat16
# (2^-9) or float8 (2^-4), near enough that another kernel is noticed.
_CAST_TOLERANCE = 2.0**-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenBase:
    """What an adapted layer keeps of its frozen kernel; a pytree, never trained.

    Attributes:
      norm: `||W0||` over the in axes, float32 or wider; the magnitude starts there.
      first_row: the kernel at index 0 of every in axis, a cheap fingerprint of the kernel.
      mask: which slices of a stack are adapted; None if all are.
      init_a: `lora_a` as it started, where the product `A B` did not start at zero; else None.
      init_b: `lora_b` as it started, likewise.

    Example:
      >>> base = describe_base(jnp.array([[3.0, 0.0], [4.0, 1.0]]), KernelAxes((), (0,), (1,)))
      >>> sorted(base.arrays())
      ['first_row', 'norm']
    """

    norm: Float[Array, "*stack *out"]
    first_row: Shaped[Array, "*stack *out"]
    mask: Bool[Array, "*stack"] | None = None
    init_a: Float[Array, "*stack *in r"] | None = None
    init_b: Float[Array, "*stack r *out"] | None = None

    def arrays(self) -> dict[str, Array]:
        """Returns the arrays that are there, by name: `FrozenBase(**base.arrays())` is `base`."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}


def describe_base(kernel: Kernel, axes: KernelAxes, eps: float = 1e-8) -> FrozenBase:
    """Returns what an adapted layer keeps of a kernel that all its slices adapt."""
    kernel = dense(kernel)
    return FrozenBase(norm=kernel_norm(kernel, axes, eps), first_row=first_row(kernel, axes))


def kernel_norm(
    kernel: Float[Array, "..."], axes: KernelAxes, eps: float = 1e-8
) -> Float[Array, "*stack *out"]:
    """Returns `||W||` over the in axes, in float32 or wider; at least `eps`.

    A column that is exactly zero has norm exactly zero, so that it can be told from a small one.

    Example:
      >>> kernel_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]]), KernelAxes((), (0,), (1,)))
      Array([5., 0.], dtype=float32)
    """
    wide = kernel.astype(wide_dtype(kernel.dtype))
    square = canonical_transpose(jnp.sum(jnp.square(wide), axes.inputs), axes)
    nonzero = canonical_transpose(jnp.any(kernel != 0, axes.inputs), axes)
    return jnp.where(nonzero, jnp.maximum(jnp.sqrt(square), eps), 0.0)


def first_row(kernel: Kernel, axes: KernelAxes) -> Float[Array, "*stack *out"]:
    """Returns the kernel at index 0 of every in axis: a cheap fingerprint of it."""
    index = tuple(0 if i in axes.inputs else slice(None) for i in range(axes.ndim))
    if isinstance(kernel, QuantizedKernel):
        kernel = dense(leading_part(kernel, axes.inputs))
    return canonical_transpose(kernel[index], axes)


def base_changed(kernel: Kernel, base: FrozenBase, axes: KernelAxes) -> Bool[Array, "*stack *out"]:
    """Returns True for each output feature whose kernel is not the one `base` describes."""
    shardings = explicit_shardings(kernel, axes)
    same = functools.partial(same_base, axes=axes)
    return ~automatically(same, shardings.get("norm"), kernel, base)


def same_base(
    kernel: Kernel, base: FrozenBase, axes: KernelAxes, cut: tuple[str, ...] = ()
) -> Bool[Array, "*stack *out"]:
    """Returns True for each output feature whose first weight is the one that `base` holds.

    A cast of the kernel to a narrower dtype is no change. `cut` is as in `KernelProduct`.
    """
    row = first_row(kernel, axes)
    if cut:  # the first shard has it
        first = sum(jax.lax.axis_index(name) for name in cut) == 0
        row = jax.lax.psum(jnp.where(first, row, 0), cut)
    kept, now = (x.astype(jnp.float32) for x in (base.first_row, row))
    # The absolute part is for float16, in which numbers under 6e-8 become 0.
    return jnp.abs(now - kept) <= _CAST_TOLERANCE * jnp.abs(kept) + 1e-7


def check_kernel(path: Path, kernel: Kernel, base: FrozenBase, axes: KernelAxes) -> None:
    """Raises `AdapterError` if the kernel of a layer is not the one its adapter was made for.

    Under a transformation such as `jax.jit`, where values are not known, only shapes are checked.
    """
    norm_shape = axes.shapes(kernel.shape, 0)["magnitude"] if kernel.ndim == axes.ndim else None
    if norm_shape != base.norm.shape:
        raise AdapterError(
            f"{layer_name(path)}: the kernel has shape {kernel.shape}, its adapter is for output "
            f"features of shape {base.norm.shape}. Load the base that it was made for"
        )
    changed = base_changed(kernel, base, axes)
    if not isinstance(changed, jax.core.Tracer) and np.any(changed):
        raise AdapterError(
            f"{layer_name(path)}: the kernel changed since apply_dora, so its stored norm is "
            "wrong. Load the base first, then adapt it"
        )
