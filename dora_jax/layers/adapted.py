"""An adapted layer and its calls: what is checked and known before `output` computes.

Here are also calls of `attend`, and meshes of explicit axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from dora_jax.config import LayerSettings
from dora_jax.decomposition.axes import Adapter, KernelAxes
from dora_jax.decomposition.base import FrozenBase
from dora_jax.decomposition.columns import Columns
from dora_jax.decomposition.product import KernelProduct
from dora_jax.decomposition.quantized import Kernel
from dora_jax.decomposition.scale import (
    effective_factors,
    is_short,
    magnitude_over_norm,
    norm_of_layer,
)
from dora_jax.decomposition.sharding import axes_that_cut
from dora_jax.errors import LayoutError, Path, layer_name
from dora_jax.layers.exact_output import exact_attend, multiplies_wide
from dora_jax.layers.layout import LayerCall, Layout, low_rank_dtype
from dora_jax.layers.output import OutputPlan, finished_output
from dora_jax.ops.mesh_types import automatically, explicit_mesh
from dora_jax.ops.output_scale import apply_scale
from dora_jax.ops.remat import scaled_name

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """What is known of one adapted layer before it is called; static and hashable.

    Attributes:
      settings: the layer's settings.
      layout: the layout of its class.
      axes: of the kernel that one call sees, without the stack axes that a scan or vmap takes.
      path: of the layer, by which rematerialisation may save its output.
      inputs: the sizes of the in axes of the whole kernel, of which `jax.shard_map` may cut a part.
    """

    settings: LayerSettings
    layout: Layout
    axes: KernelAxes
    path: Path = ()
    inputs: tuple[int, ...] = ()

    def product(
        self, layer: Any, kernel: Kernel, axes: KernelAxes, dtype: DTypeLike, base: FrozenBase
    ) -> KernelProduct:
        """Returns how the norm multiplies a kernel of these axes.

        Raises:
          LayoutError: inside `jax.shard_map` the kernel is cut along an in axis, and its type does
            not say by which mesh axis.
        """
        cut = axes_that_cut(kernel, axes.inputs, self.inputs, base.norm)
        if cut is None:
            raise LayoutError(
                f"{layer_name(self.path)}: this call sees a part of the kernel's in axes, "
                f"{[kernel.shape[i] for i in axes.inputs]} of {list(self.inputs)}, and which mesh "
                "axes cut them is not known, so that its norm cannot be summed: inside "
                "jax.shard_map leave check_vma on, and pass kernel, adapters and base with the "
                "specs of dora.shardings"
            )
        return KernelProduct(axes, dtype, getattr(layer, "precision", None), cut)


@dataclasses.dataclass(frozen=True)
class AttendCall:
    """One call of an embedding's `attend`.

    Attributes:
      layer: the Linen or NNX layer, for its attributes.
      query: `(*batch, features)`.
      kernel: the frozen table `(vocab, features)`, quantised or not.
      attend: the layer's own method on the frozen table.
    """

    layer: Any
    query: Float[Array, "*batch features"]
    kernel: Kernel
    attend: Callable[[Array], Array]


def adapted_output(
    adapted: AdaptedLayer, call: LayerCall, adapter: Adapter, base: FrozenBase
) -> Float[Array, "..."]:
    """Returns the output of an adapted layer: `c h + bias`, `h = x W0 + s dropout(x) A B`.

    The bias is not scaled. It is added last rather than subtracted from the plain layer's output
    first, which would not be exact.

    Under explicit sharding the plain layer's output has the sharding of the result. What is added
    to it is computed with automatic axes, see `automatically`.

    Args:
      adapted: the layer's settings, layout and axes.
      call: the arguments of the call, and the plain layer's output.
      adapter: `lora_a`, `lora_b`, `magnitude`, as far as the settings have them; `scale` in place
        of the magnitude if it was precomputed.
      base: what is kept of the frozen kernel.

    Raises:
      LayoutError: this call uses the kernel in another way than the one that was traced.
    """
    if explicit_mesh(call.plain_output) is None:
        return _adapted_output(adapted, call, adapter, base)
    traced, arguments_of = call.traced_arguments()

    def run(traced: list[Array], arrays: Any, adapter: Adapter, base: FrozenBase) -> Array:
        arguments = dict(arguments_of(traced))
        if "out_sharding" in arguments:  # of the plain output
            arguments["out_sharding"] = None
        automatic = dataclasses.replace(call, arguments=arguments, **arrays)
        return _adapted_output(adapted, automatic, adapter, base)

    arrays: dict[str, Any]
    arrays = {"plain_output": call.plain_output, "kernel": call.kernel, "bias": call.bias}
    if isinstance(call.dropout, jax.tree_util.Partial):  # with its key
        arrays["dropout"] = call.dropout
    out = jax.typeof(call.plain_output).sharding
    return cast("Array", automatically(run, out, traced, arrays, dict(adapter), base))


def _adapted_output(
    adapted: AdaptedLayer, call: LayerCall, adapter: Adapter, base: FrozenBase
) -> Float[Array, "..."]:
    """Does what `adapted_output` does, without a mesh of explicit axes."""
    axes = _checked_axes(adapted, call)
    dtype = compute_dtype(call.layer, call.arguments[adapted.layout.inputs], call.kernel)
    plan = OutputPlan(
        settings=adapted.settings,
        layout=adapted.layout,
        axes=axes,
        output_axes=tuple(adapted.layout.output_axes(call.layer, call.arguments, axes)),
        dtype=dtype,
        product=adapted.product(call.layer, call.kernel, axes, dtype, base),
        name=scaled_name(adapted.path),
    )
    return finished_output(plan, call, adapter, base)


def adapted_attend(
    adapted: AdaptedLayer, call: AttendCall, adapter: Adapter, base: FrozenBase
) -> Float[Array, "*batch vocab"]:
    """Returns `query W'^T` for an adapted embedding table, so that a tied head sees the adapter.

    The scale is per feature, which is contracted here: it acts on the query.
    """
    settings, axes = adapted.settings, adapted.axes
    dtype = compute_dtype(call.layer, call.query, call.kernel)
    query = call.query.astype(dtype)
    product = adapted.product(call.layer, call.kernel, axes, dtype, base)

    def scaled(query: Array, kernel: Kernel, adapter: Adapter, base: FrozenBase) -> Any:
        factors = effective_factors(adapter, base, axes) if settings.rank else None
        norm = norm_of_layer(settings, kernel, adapter, base, product, factors)
        if settings.decompose:
            scale = magnitude_over_norm(settings, kernel, adapter, base, product, norm)
            query = apply_scale(query, scale)
        return query, factors, norm

    def added(query: Array, a: Array, b: Array) -> Array:
        return settings.scaling * (query @ b.T) @ a.T

    if explicit_mesh(query, call.kernel) is not None:
        return _explicit_attend(call, scaled, added, (query, call.kernel, dict(adapter), base))
    query, factors, norm = scaled(query, call.kernel, adapter, base)
    if factors is None:
        return call.attend(query)
    a, b = (x.astype(low_rank_dtype(dtype)) for x in factors)
    if norm is not None and multiplies_wide(dtype, product.precision):
        columns = Columns.of(product, settings.scaling, call.kernel, b)
        short = is_short(norm, base)
        return exact_attend(columns, call.attend, added, query, (short, call.kernel, a, b))
    logits = call.attend(query)
    return logits + added(query, a, b).astype(logits.dtype)


def _explicit_attend(
    call: AttendCall,
    scaled: Callable[..., Any],
    added: Callable[..., Array],
    operands: tuple[Any, ...],
) -> Float[Array, "*batch vocab"]:
    """Does what `adapted_attend` does on a mesh of explicit axes, without its exact way.

    The layer's own product stands between two parts with automatic axes.
    """
    dtype = low_rank_dtype(operands[0].dtype)
    by = jax.typeof(operands[0]).sharding
    query = automatically(lambda *given: scaled(*given)[0], by, *operands)
    logits = call.attend(query)

    def low_rank(query: Array, *others: Any) -> Array:
        factors = scaled(query, *others)[1]
        if factors is None:
            return jnp.zeros(logits.shape, logits.dtype)
        return added(query, *(x.astype(dtype) for x in factors)).astype(logits.dtype)

    return logits + automatically(low_rank, jax.typeof(logits).sharding, query, *operands[1:])


def compute_dtype(layer: Any, inputs: Array | Kernel, kernel: Kernel) -> DTypeLike:
    """Returns the dtype in which a layer multiplies: its own, or what its arguments promote to."""
    own = getattr(layer, "dtype", None)
    if own is not None:
        return own
    floating = [x for x in (inputs, kernel) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.result_type(*floating)


def _checked_axes(adapted: AdaptedLayer, call: LayerCall) -> KernelAxes:
    """Returns the kernel's axes; raises `LayoutError` if this call uses it in another way."""
    axes = adapted.layout.axes(call.layer, call.arguments)
    if axes != adapted.axes:
        raise LayoutError(
            f"{type(call.layer).__name__} was adapted for a kernel of {adapted.axes}, this call "
            f"uses it as {axes}; one adapter cannot serve both: exclude_modules"
        )
    return axes
