"""How a layer class uses its kernel: the base class of every layout, and the record of a call.

One `Layout` serves a Linen layer and its NNX namesake, since both have the same attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.quantized import Kernel, QuantizedKernel
from dora_jax.errors import LayoutError, Path

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

# The arguments of a layer's call, by name.
Arguments = Mapping[str, Any]
# Where the kernel's axes stand in a layer's output: a kernel axis, None for an axis of the inputs,
# `...` for any number of those.
OutputAxes = Sequence["int | EllipsisType | None"]

# Why an embedding cannot be adapted whose table is used outside of its layer.
TIED = (
    "a tied head reads its table without calling it (attend), so it would not see the adapter, and "
    "merging would change what the model computes: leave it out of target_modules"
)

# Why a layer cannot be adapted whose kernel is used outside of it.
READ = (
    "the model computes with its kernel outside of the layer too, which would not see the adapter, "
    "and merging would change what the model computes: exclude_modules"
)


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer that is adapted.

    Attributes:
      layer: the Linen or NNX layer, for its attributes.
      arguments: of the call, by name.
      plain_output: `x W0` from the layer's own method, without the bias.
      kernel: the frozen kernel `W0`, quantised or not.
      bias: the layer's bias; None if it has none.
      dropout: acts on the input of the low-rank branch. A `jax.tree_util.Partial` of its key where
        it draws, so that the key is known apart.
      run: `(arguments, kernel, features) -> output`, the layer's own method with another kernel, of
        `features` out features, and no bias.
    """

    layer: Any
    arguments: Arguments
    plain_output: Float[Array, "..."]
    kernel: Kernel
    bias: Float[Array, "..."] | None
    dropout: Callable[[Array], Array]
    run: Callable[[Arguments, Array, int], Array]

    def traced_arguments(self) -> tuple[list[Array], Callable[[Sequence[Array]], Arguments]]:
        """Returns the arrays among the arguments, and what puts others in their places."""
        leaves, structure = jax.tree.flatten(dict(self.arguments))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def with_others(arrays: Sequence[Array]) -> Arguments:
            given = list(leaves)
            for i, array in zip(places, arrays, strict=True):
                given[i] = array
            arguments: Arguments = jax.tree.unflatten(structure, given)
            return arguments

        return [leaves[i] for i in places], with_others


class LowRank(NamedTuple):
    """The low-rank branch `scaling * A B` of one call.

    Attributes:
      a: `A (*stack, *in, k)`.
      b: `B (*stack, k, *out)`.
      scaling: `s`.
      layer_dtype: in which the layer multiplies.
    """

    a: Array
    b: Array
    scaling: float
    layer_dtype: DTypeLike

    @property
    def dtype(self) -> DTypeLike:
        """The dtype in which the branch multiplies, see `low_rank_dtype`."""
        return low_rank_dtype(self.layer_dtype)

    def factors(self) -> tuple[Array, Array]:
        """Returns `A` and `s B` in the dtype in which the branch multiplies.

        The scaling is multiplied into a factor, before it is rounded to that dtype, and not into
        `x A`: so nothing stands between the two products.
        """
        return self.a.astype(self.dtype), (self.scaling * self.b).astype(self.dtype)


def low_rank_dtype(layer_dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype in which the low-rank branch multiplies: the layer's, float32 for float16.

    With a scaled loss, as float16 needs, `g B^T` soon is above float16's largest number, 65504.
    One such entry makes all of the gradient of `A` NaN.
    """
    return jnp.float32 if layer_dtype == jnp.float16 else layer_dtype


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer class uses its kernel. Subclasses say it in `axes` and `low_rank`.

    Frozen and hashable: a layout is a static part of every adapted layer.

    Attributes:
      kernel: the name of the kernel among the layer's parameters.
      bias: the name of what the layer adds to its output, if it adds anything: it is not scaled.
      inputs: the name of the argument that the kernel is multiplied with.
      dropout: whether adapter dropout can act on that argument.
      attend: whether the layer has a method `attend(query)` that computes `query kernel^T`.
      all_linear: whether `target_modules="all-linear"` covers the layer.
    """

    kernel: str = "kernel"
    bias: str = "bias"
    inputs: str = "inputs"
    dropout: bool = True
    attend: bool = False
    all_linear: bool = True

    def axes(self, layer: Any, arguments: Arguments) -> KernelAxes:
        """Returns the axes of the kernel that one call of the layer sees.

        Stack axes that a scan or vmap adds are found from the stored kernel. `arguments` is empty
        where no call is known yet.

        Raises:
          LayoutError: the layer uses its kernel in a way that a low rank does not fit; says the
            fix.
        """
        raise NotImplementedError

    def low_rank(self, call: LayerCall, branch: LowRank) -> Array:
        """Returns `scaling * (inputs A) B`, in the shape of the layer's output.

        The call's arguments hold the inputs after dropout.
        """
        raise NotImplementedError

    def output_axes(self, layer: Any, arguments: Arguments, axes: KernelAxes) -> OutputAxes:
        """Returns where the kernel's axes stand in the output.

        By default the stack axes come first, then those of the inputs, then the out axes.
        """
        return (*axes.stack, ..., *axes.outputs)

    def shared_axes(self, axes: KernelAxes) -> KernelAxes:
        """Returns the axes as the scales of a quantised kernel see them: shared along `inputs`."""
        return axes

    def stand_in(self, layer: Any) -> Hashable | None:
        """Returns the attributes of a layer that `low_rank` and others here read, None if unknown.

        It is hashable, and equal for layers of a kind: so a program is traced once for all.
        """
        return None

    def is_matrix_product(self, layer: Any) -> bool:
        """Returns whether a layer computes `inputs @ kernel`, in the dtype of both, and no more."""
        return False

    def matrix_product(self, call: LayerCall, kernel: Array) -> Array:
        """Returns `inputs @ kernel` in the kernel's dtype; `is_matrix_product` is true."""
        raise NotImplementedError

    @property
    def read_elsewhere(self) -> str:
        """Why a layer cannot be adapted whose kernel the model uses outside of it, with the fix."""
        return TIED if self.attend else READ

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of a layer that use its kernel."""
        return ("__call__", "attend") if self.attend else ("__call__",)


def is_array(value: Any) -> bool:
    """Returns whether a parameter is an array, or the shape of one; a quantised one is a record."""
    return hasattr(value, "dtype") and jax.tree_util.all_leaves([value])


def is_kernel(value: Any) -> bool:
    """Returns whether a parameter can be adapted: an array, or one that is quantised."""
    return isinstance(value, QuantizedKernel) or is_array(value)


def quantised(value: Any) -> str:
    """Returns why a layer whose kernel is no array cannot be adapted, with the fix."""
    return (
        f"its kernel is a {type(value).__name__}, no array: a base that is quantised, as by qwix, "
        "is not adapted yet. Adapt the float model, or exclude_modules"
    )


def quantised_since(value: Any) -> str:
    """Returns why an adapted layer cannot be used whose kernel is no array any more."""
    return (
        f"its kernel is a {type(value).__name__}, no array: it was quantised after it was adapted. "
        "Merge the adapter into the float model first"
    )


def further_kernels(layout: Layout, params: Mapping[Path, Any], stack: int = 0) -> str:
    """Returns why a layer with more than one kernel cannot be adapted; "" if it has one.

    Args:
      layout: of the layer's class.
      params: the layer's own parameters by path, those of modules inside it too.
      stack: how many stack axes each has in front.
    """
    others = [
        ".".join(path)
        for path, value in params.items()
        if path[0] != layout.kernel
        and path != (layout.bias,)
        and is_array(value)
        and len(value.shape) - stack >= 2
        and jnp.issubdtype(value.dtype, jnp.inexact)
    ]
    if not others:
        return ""
    return (
        f"it has {', '.join(others)} next to its kernel {layout.kernel}, and a layout describes a "
        "layer of one kernel: make each a layer of its own, or exclude_modules"
    )


class Unsupported(NamedTuple):
    """Why a layer cannot be adapted, with the fix; and whether "all-linear" would cover it."""

    reason: str
    all_linear: bool


def bind_call(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a method's call by name, without its first, the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> list(bind_call(nnx.Linear.__call__, (layer, jnp.ones(3)), {}))
      ['inputs', 'out_sharding']
    """
    bound = inspect.signature(method).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def stored_axes(axes: KernelAxes, stored_ndim: int, path: str) -> KernelAxes:
    """Returns the axes of a stored kernel, whose further leading axes are stack.

    Raises:
      LayoutError: the stored kernel has fewer axes than the layer contracts.

    Example:
      >>> stored_axes(KernelAxes((), (0,), (1,)), 3, "layers.mlp")
      KernelAxes(stack=(0,), inputs=(1,), outputs=(2,))
    """
    extra = stored_ndim - axes.ndim
    if extra < 0:
        raise LayoutError(
            f"{path}: the kernel has {stored_ndim} axes, its layer needs at least {axes.ndim}"
        )
    stack, inputs, outputs = (tuple(i + extra for i in group) for group in axes)
    return KernelAxes(tuple(range(extra)) + stack, inputs, outputs)


def refuse_stateful_product(layer: Any) -> None:
    """Raises `LayoutError` if a layer makes its product with a class that may keep a state."""
    for name in ("dot_general_cls", "conv_general_dilated_cls"):
        if getattr(layer, name, None) is not None:
            raise LayoutError(
                f"the {name} of {type(layer).__name__} may keep a state for its one kernel, which "
                "the low-rank products cannot share: exclude_modules, or give it a function"
            )
