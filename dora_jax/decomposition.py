"""The mathematics of DoRA, on arrays.

A kernel's axes are of three kinds: *stack* (scan-stacked layers, vmapped copies, experts), *in*
(contracted with the input) and *out*. For each stack index and output feature, DoRA
(arXiv 2402.09353, eq. 5) rebuilds the frozen kernel `W0` as

    W' = m * V / n,   V = W0 + s A B,   n = ||V|| over the in axes,

with a trainable magnitude `m (*stack, *out)` and a trainable low-rank direction
`A (*stack, *in, r)`, `B (*stack, r, *out)`. Nothing here but `materialize` forms an array as large
as the kernel.

Shapes are written `stack`, `in`, `out` for possibly several axes each.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    from dora_jax.config import AdapterSpec

Adapter = Mapping[str, "Array"]

# How far a kernel may be from the one the adapter was made for: far enough for a cast to bfloat16
# (2^-9) or float8 (2^-4), near enough that another kernel is noticed.
_CAST_TOLERANCE = 2.0**-4


class KernelAxes(NamedTuple):
    """The axes of a kernel, each listed once in one of three groups.

    Example:
      >>> KernelAxes(stack=(0,), inputs=(1,), outputs=(2,)).ndim  # (layers, in, out)
      3
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return len(self.stack) + len(self.inputs) + len(self.outputs)

    def shapes(self, kernel_shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `lora_a`, `lora_b` and `magnitude` for a kernel's shape."""
        stack, inputs, outputs = (tuple(kernel_shape[i] for i in group) for group in self)
        return {
            "lora_a": (*stack, *inputs, rank),
            "lora_b": (*stack, rank, *outputs),
            "magnitude": (*stack, *outputs),
        }

    def letters(self) -> tuple[str, str, str, str]:
        """Returns einsum letters: of the kernel, and of its stack, in and out axes."""
        kernel = string.ascii_lowercase[: self.ndim]
        stack, inputs, outputs = ("".join(kernel[i] for i in group) for group in self)
        return kernel, stack, inputs, outputs


def kernel_norm(
    kernel: Float[Array, "..."], axes: KernelAxes, eps: float = 1e-8
) -> Float[Array, "*stack *out"]:
    """Returns `||W||` over the in axes, in float32 or wider; at least `eps`.

    A column that is exactly zero has norm exactly zero, so that it can be told from a small one.

    Example:
      >>> kernel_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]]), KernelAxes((), (0,), (1,)))
      Array([5., 0.], dtype=float32)
    """
    letters, stack, _, outputs = axes.letters()
    wide = kernel.astype(_wide(kernel.dtype))
    to_canonical = _einsum_transpose(letters, axes, stack + outputs)
    square = to_canonical(jnp.sum(jnp.square(wide), axes.inputs))
    nonzero = to_canonical(jnp.any(kernel != 0, axes.inputs))
    return jnp.where(nonzero, jnp.maximum(jnp.sqrt(square), eps), 0.0)


def kernel_row(kernel: Float[Array, "..."], axes: KernelAxes) -> Float[Array, "*stack *out"]:
    """Returns the kernel at index 0 of every in axis: the mark by which a base is recognised."""
    letters, stack, _, outputs = axes.letters()
    index = tuple(0 if i in axes.inputs else slice(None) for i in range(axes.ndim))
    return _einsum_transpose(letters, axes, stack + outputs)(kernel[index])


def relative_square_change(
    kernel: Float[Array, "..."],
    lora_a: Float[Array, "*stack *in r"],
    lora_b: Float[Array, "*stack r *out"],
    base_norm: Float[Array, "*stack *out"],
    scaling: float,
    axes: KernelAxes,
    *,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*stack *out"]:
    """Returns `(||W0 + s A B||^2 - ||W0||^2) / ||W0||^2`, without forming `W0 + s A B`.

    From `||W0 + s A B||^2 = ||W0||^2 + 2 s <A^T W0, B> + s^2 diag(B^T (A^T A) B)`, accumulated in
    float32 or wider. It is exactly 0 where `lora_b` is 0. Costs `2 r in out` operations.

    Args:
      base_norm: `||W0||`, zero where a column is zero.
      dtype: the dtype in which the layer multiplies; defaults to the kernel's.
      precision: of the product with the kernel, as for `jax.lax.dot_general`.
    """
    letters, stack, inputs, outputs = axes.letters()
    dtype = kernel.dtype if dtype is None else dtype
    wide = _wide(dtype)
    # The products the layer itself makes are of A and B as rounded to its dtype.
    a, b = lora_a.astype(dtype), lora_b.astype(dtype)
    cross = jnp.einsum(
        f"{stack}{inputs}y,{letters}->{stack}y{outputs}",
        a,
        kernel.astype(dtype),
        precision=precision,
        preferred_element_type=wide,
    )
    a, b = a.astype(wide), b.astype(wide)
    gram = jnp.einsum(f"{stack}{inputs}y,{stack}{inputs}z->{stack}yz", a, a)
    square = jnp.einsum(f"{stack}yz,{stack}z{outputs}->{stack}y{outputs}", gram, b)
    change = jnp.sum((2 * cross + scaling * square) * b, axis=len(stack)) * scaling
    return change / jnp.square(jnp.where(base_norm == 0, 1, base_norm))


def direction_norm(
    relative_change: Float[Array, "*stack *out"], base_norm: Float[Array, "*stack *out"], eps: float
) -> Float[Array, "*stack *out"]:
    """Returns `n = ||W0 + s A B||` from `relative_square_change`, at least `eps`.

    `||W0|| sqrt(1 + change)` is exactly `||W0||` for a change of 0, on every backend and in every
    fusion, which a sum of squares computed anew is not.
    """
    safe = jnp.where(base_norm == 0, 1, base_norm)
    least = jnp.square(eps / safe)
    return safe * jnp.sqrt(jnp.maximum(1 + relative_change, least))


def acting_factors(adapter: Adapter, base: Adapter, axes: KernelAxes) -> tuple[Array, Array]:
    """Returns the factors `A (*stack, *in, k)` and `B (*stack, k, *out)` as they act on the kernel.

    A `mask (*stack,)` in `base` switches slices of a stack off. Factors that did not start at a
    product of zero (`start_a`, `start_b` in `base`) act by what they changed, `A B - A0 B0`, as one
    product of twice the rank: the frozen kernel stays the pretrained one.
    """
    a, b = adapter["lora_a"], adapter["lora_b"]
    if "start_a" in base:
        a = jnp.concatenate([a, base["start_a"]], axis=-1)
        b = jnp.concatenate([b, -base["start_b"]], axis=len(axes.stack))
    if "mask" in base:
        b = b * _over_trailing(base["mask"], b.ndim).astype(b.dtype)
    return a, b


def scale_minus_one(
    spec: AdapterSpec,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: Adapter,
    axes: KernelAxes,
    *,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*stack *out"]:
    """Returns `d = (m - n) / n`, so that the adapted output is `h + d h` with `h = x V`.

    At initialisation `m` and `n` are the same stored number and `d` is exactly 0; `m / n - 1` need
    not be. Depends on parameters alone. A zero column keeps scale 0 (`d = -1`). Where the kernel is
    not the one that `base` describes, `d` is NaN: a wrong norm must not pass unnoticed.

    Args:
      spec: the layer's settings.
      kernel: the frozen kernel `W0`.
      adapter: `lora_a`, `lora_b`, `magnitude`, as far as the settings have them; or `scale`, `d`
        itself, where it was hoisted.
      base: `norm` and `row` from `describe_base`; `mask`, `start_a`, `start_b` where there are
        any, see `acting_factors`.
      axes: the kernel's axes.
      dtype: the dtype in which the layer multiplies.
      precision: of the product with the kernel.
    """
    if "scale" in adapter:
        return adapter["scale"]
    norm = base["norm"]
    magnitude = _magnitude(adapter["magnitude"], norm) if spec.has_magnitude else norm
    n = jnp.where(norm == 0, 1, norm)
    if spec.normalize and spec.rank:
        change = relative_square_change(
            kernel,
            *acting_factors(adapter, base, axes),
            norm,
            spec.scaling,
            axes,
            dtype=dtype,
            precision=precision,
        )
        n = direction_norm(change, norm, spec.eps)
        if spec.norm_gradient == "detached":
            n = jax.lax.stop_gradient(n)
    d = jnp.where(norm == 0, -1, (magnitude - n) / n)
    if "mask" in base:
        d = jnp.where(_over_trailing(base["mask"], d.ndim), d, 0)
    return jnp.where(_same_base(kernel, base, axes), d, jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def apply_scale(
    h: Float[Array, "*batch out"], d: Float[Array, "#*batch out"], name: str = "dora_scaled"
) -> Float[Array, "*batch out"]:
    """Returns `y = h + d h` in the dtype of `h`, multiplied in float32 or wider.

    A scale near 1 that is rounded to bfloat16 first would be lost. The gradient of `d` takes `h`
    from `y`, as `y / (1 + d)`: `y` is what the next layer keeps for its own backward pass, so `h`
    need not be kept beside it. Both are off by a rounding to the dtype; of a scale near 0, that of
    `1 + d` adds to it: in float32 the gradient of `d` was off by 1e-4 of itself for scales of 1e-4,
    by 6e-3 for 1e-6, and by less than 1e-6 from 0.1 on. A scale of exactly 0 gets no gradient.

    Args:
      h: the output before the scale.
      d: the scale less 1, in float32 or wider.
      name: by which `jax.checkpoint` may save `y`.

    Example:
      >>> apply_scale(jnp.ones(2, jnp.bfloat16), jnp.array([0.0, 0.5]))
      Array([1, 1.5], dtype=bfloat16)
    """
    wide = h.astype(_wide(h.dtype))
    return (wide + d.astype(wide.dtype) * wide).astype(h.dtype)


@apply_scale.defjvp
def _apply_scale_jvp(
    name: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # Not by `apply_scale`, inside of which a policy would not see the name.
    y = checkpoint_name(apply_scale.fun(*primals, name), name)
    return y, _scale_tangent(y, primals[1], *tangents)


# Rematerialised, so that what is kept for the backward pass is `y` in its own dtype: the float32
# copy lives within the fused epilogue alone.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _scale_tangent(y: Array, d: Array, h_dot: Array, d_dot: Array) -> Array:
    """Returns `(1 + d) h' + d' h`, of `h = y / (1 + d)`."""
    wide = _wide(y.dtype)
    scale = 1 + d.astype(wide)
    relative = jnp.where(scale == 0, 0, d_dot.astype(wide) / jnp.where(scale == 0, 1, scale))
    return (scale * h_dot.astype(wide) + relative * y.astype(wide)).astype(y.dtype)


def materialize(
    spec: AdapterSpec,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: Adapter,
    axes: KernelAxes,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Returns the merged kernel `m (W0 + s A B) / n` in the shape and dtype of `kernel`.

    Computed in float32 or wider. The kernel itself, bit for bit, while the adapter is untrained.
    `dtype` is that of the result, if not the kernel's.
    """
    letters, stack, inputs, outputs = axes.letters()
    merged = kernel.astype(_wide(kernel.dtype))
    if spec.rank:
        a, b = (x.astype(merged.dtype) for x in acting_factors(adapter, base, axes))
        delta = jnp.einsum(
            f"{stack}{inputs}y,{stack}y{outputs}->{letters}", a, b, precision="highest"
        )
        merged = merged + spec.scaling * delta
    if spec.decompose:
        wide = kernel.astype(merged.dtype)
        d = scale_minus_one(spec, wide, adapter, base, axes, precision="highest")
        merged = merged + merged * _over_inputs(d, axes)
    return merged.astype(kernel.dtype if dtype is None else dtype)


@functools.partial(jax.jit, static_argnames=("spec", "axes"))
def merge_kernel(
    spec: AdapterSpec,
    kernel: Float[Array, "..."],
    adapter: Adapter,
    base: Adapter,
    axes: KernelAxes,
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Returns the merged kernel, and the share of the change that its dtype rounds away.

    The share is `||rounded - W'|| / ||W' - W0||` in float32 or wider; 0 where nothing changed, but
    for what products that cancel leave of rounding.
    """
    exact = materialize(spec, kernel, adapter, base, axes, dtype=_wide(kernel.dtype))
    rounded = exact.astype(kernel.dtype)
    wide = kernel.astype(exact.dtype)
    error, change, whole = (
        jnp.linalg.norm(x.ravel())
        for x in (exact - rounded.astype(exact.dtype), exact - wide, wide)
    )
    unchanged = change <= 1e-6 * whole
    return rounded, jnp.where(unchanged, 0, error / jnp.where(unchanged, 1, change))


def describe_base(
    kernel: Float[Array, "..."], axes: KernelAxes, eps: float = 1e-8
) -> dict[str, Array]:
    """Returns what an adapted layer keeps of its frozen kernel.

    `norm` is `||W0||`, from which the magnitude starts; `row` recognises the kernel later.
    """
    return {"norm": kernel_norm(kernel, axes, eps), "row": kernel_row(kernel, axes)}


def base_changed(
    kernel: Float[Array, "..."], base: Adapter, axes: KernelAxes
) -> Float[Array, "*stack *out"]:
    """Returns True for each output feature whose kernel is not the one `base` describes."""
    return ~_same_base(kernel, base, axes)


def _same_base(kernel: Array, base: Adapter, axes: KernelAxes) -> Array:
    row, now = (x.astype(jnp.float32) for x in (base["row"], kernel_row(kernel, axes)))
    # The absolute part is for float16, in which numbers under 6e-8 become 0.
    return jnp.abs(now - row) <= _CAST_TOLERANCE * jnp.abs(row) + 1e-7


def _magnitude(
    magnitude: Float[Array, "*stack *out"], norm: Float[Array, "*stack *out"]
) -> Float[Array, "*stack *out"]:
    """Returns the magnitude in the dtype of the norm.

    A narrower one that still is the norm, rounded, stands for the norm itself, so that an untrained
    adapter is an identity in any dtype. (XLA may leave out a cast to and fro, not this rounding.)
    """
    if magnitude.dtype == norm.dtype:
        return magnitude
    narrow = jnp.finfo(magnitude.dtype)
    rounded = jax.lax.reduce_precision(norm, narrow.nexp, narrow.nmant)
    magnitude = magnitude.astype(norm.dtype)
    return magnitude + jnp.where(magnitude == rounded, norm - rounded, 0)


def _wide(dtype: DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _over_trailing(mask: Array, ndim: int) -> Array:
    """Gives a mask of leading axes trailing ones of length 1, for broadcasting."""
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _over_inputs(x: Array, axes: KernelAxes) -> Array:
    """Lays an array of shape `(*stack, *out)` along a kernel's axes, for broadcasting."""
    kept = axes.stack + axes.outputs
    order = sorted(range(len(kept)), key=lambda i: kept[i])
    return jnp.expand_dims(jnp.transpose(x, order), axes.inputs)


def _einsum_transpose(letters: str, axes: KernelAxes, canonical: str) -> Callable[[Array], Array]:
    """Returns the transpose that brings a kernel without its in axes to `stack + out` order."""
    kept = "".join(c for i, c in enumerate(letters) if i not in axes.inputs)
    return lambda x: jnp.transpose(x, [kept.index(c) for c in canonical])
