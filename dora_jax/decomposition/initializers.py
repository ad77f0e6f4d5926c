"""Initial values of a layer's adapter, with which the adapted model equals the base model."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.config import CUSTOM, DoRAConfig, InitFunction, LayerSettings, TrainedConfig
from dora_jax.decomposition.axes import KernelAxes
from dora_jax.decomposition.base import FrozenBase, describe_base
from dora_jax.decomposition.quantized import Kernel, dense, is_abstract
from dora_jax.decomposition.sharding import explicit_shardings, layer_shardings
from dora_jax.errors import ConfigError, Path, layer_name
from dora_jax.ops.mesh_types import automatically
from dora_jax.processes import spans_processes

if TYPE_CHECKING:
    from jax.sharding import NamedSharding
    from jaxtyping import Array, Float


ArrayDict = dict[str, "Array"]


def is_selected(settings: LayerSettings, axes: KernelAxes) -> bool:
    """Whether `layers_to_transform`, if it is set, can select this layer or some of its stack.

    `settings.indices` holds the indices for a layer whose path has no number. They select from the
    stack of its kernel, so that a layer without a stack is left out.
    """
    return settings.indices is None or bool(axes.stack)


def init_layer(
    config: DoRAConfig,
    settings: LayerSettings,
    path: Path,
    key: Array,
    kernel: Kernel | jax.ShapeDtypeStruct,
    axes: KernelAxes,
) -> tuple[ArrayDict, FrozenBase]:
    """Returns the adapter of one layer and what it keeps of its base.

    The random numbers of a layer depend only on `key` and its path, so that a layer starts the same
    whatever other layers are adapted. From an abstract kernel come abstract arrays. Each array is
    made where `layer_shardings` has it, so that no device or host ever holds one that is cut.

    Returns:
      `{"lora_a", "lora_b", "magnitude"}`, as far as the settings have them, and the `FrozenBase`.

    Raises:
      ConfigError: `layers_to_transform` has an index past the end of the stack; a function for
        `init` returns factors of wrong shapes, or a file's "custom" stands where it has to be.

    Warns:
      UserWarning: columns of the kernel are exactly zero; they stay zero.
    """
    name = layer_name(path)
    length = kernel.shape[axes.stack[0]] if axes.stack else 0
    if settings.indices is not None and not set(settings.indices) <= {*range(-length, length)}:
        raise ConfigError(
            f"{name}: layers_to_transform asks for {list(settings.indices)}, but the stack has "
            f"{length} layers"
        )
    settings = _only_of_the_start(settings, config)
    static = (settings, config.init_name, config.adapter_dtype, axes)
    start = functools.partial(_build, *static)
    shardings = layer_shardings(kernel, axes)
    if is_abstract(kernel):
        return _shapes(start, key, kernel, shardings)
    key = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
    given = _given_factors(config, settings.rank, path, key, kernel, axes)
    if shardings is None:
        build = _build_jit
    else:
        places = jax.tree.map(lambda x: x.sharding, _shapes(start, key, kernel, shardings))
        leaves, structure = jax.tree.flatten(places)
        build = _build_at(structure, tuple(leaves), isinstance(kernel, jax.core.Tracer))
    adapter, base = build(*static, key, kernel, *given)
    _warn_of_zero_columns(name, base.norm)
    return adapter, base


def _shapes(
    start: Callable[..., Any],
    key: Array,
    kernel: Any,
    shardings: Mapping[str, NamedSharding] | None,
) -> tuple[ArrayDict, FrozenBase]:
    """Returns the shapes of what `init_layer` returns, with the shardings if there are any."""
    adapter, base = jax.eval_shape(start, key, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
    if shardings is None:
        return adapter, base

    def place(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
            for name, x in arrays.items()
        }

    return place(adapter), FrozenBase(**place(base.arrays()))


def _only_of_the_start(settings: LayerSettings, config: DoRAConfig) -> LayerSettings:
    """Returns settings without those that change no start, so that fewer programs are compiled."""
    start = LayerSettings(rank=settings.rank, alpha=1.0, scaling=1.0)
    return dataclasses.replace(
        start,
        scaling=settings.scaling if config.changes_product else 1.0,
        magnitude_trainable=settings.magnitude_trainable,
        decompose=settings.decompose,
        eps=settings.eps,
        indices=settings.indices,
    )


def _given_factors(
    config: DoRAConfig, rank: int, path: Path, key: Array, kernel: Any, axes: KernelAxes
) -> tuple[Array, ...]:
    """Returns the factors with which a function starts a layer; none where `init` is a name.

    The function is called as it is, not compiled: what it closes over is no constant of a program.
    """
    if not rank or config.init_name != CUSTOM or isinstance(config, TrainedConfig):
        return ()
    if not callable(config.init):
        raise ConfigError(
            f"init is {CUSTOM!r}, a function that no file holds: give it again, as in "
            "dataclasses.replace(config, init=function)"
        )
    init: InitFunction = config.init

    def factors(kernel: Kernel) -> tuple[Array, ...]:
        matrices = as_matrices(dense(kernel), axes)
        *stack, inner, outer = matrices.shape
        wanted = [(*stack, inner, rank), (*stack, rank, outer)]
        found = tuple(map(jnp.asarray, init(path, matrices, rank, key)))
        if (shapes := [x.shape for x in found]) != wanted:
            raise ConfigError(
                f"{layer_name(path)}: init returned arrays of shapes {shapes}, where A and B have "
                f"{wanted}"
            )
        own = axes.shapes(kernel.shape, rank)
        return found[0].reshape(own["lora_a"]), found[1].reshape(own["lora_b"])

    shardings = explicit_shardings(kernel, axes)
    places = tuple(shardings.get(name) for name in ("lora_a", "lora_b"))
    return cast("tuple[Array, ...]", automatically(factors, places, kernel))


def _build(
    settings: LayerSettings,
    init: str,
    dtype: str,
    axes: KernelAxes,
    key: Array,
    kernel: Kernel,
    *given: Array,
) -> tuple[ArrayDict, FrozenBase]:
    base = describe_base(kernel, axes, settings.eps)
    shapes = axes.shapes(kernel.shape, settings.rank)
    adapter, kept = {}, {}
    if settings.rank and init in ("pissa", "olora", CUSTOM):
        if init == CUSTOM:  # of adapters that are loaded, the file has them
            factors = given or tuple(jnp.zeros(shapes[name]) for name in ("lora_a", "lora_b"))
        else:
            factors = _of_kernel(init, kernel, axes, settings.rank, key)
            # Divide each factor by sqrt(s), so that s*A*B is the product.
            factors = tuple(factor / math.sqrt(settings.scaling) for factor in factors)
        for name, factor in zip("ab", factors, strict=True):
            start = factor.reshape(shapes[f"lora_{name}"]).astype(dtype)
            adapter[f"lora_{name}"] = kept[f"init_{name}"] = start
    elif settings.rank:
        fan_in = math.prod(kernel.shape[i] for i in axes.inputs)
        adapter["lora_a"] = _draw(init, key, shapes["lora_a"], fan_in, settings.rank).astype(dtype)
        adapter["lora_b"] = jnp.zeros(shapes["lora_b"], dtype)
    if settings.indices is not None:
        stack = tuple(kernel.shape[i] for i in axes.stack)
        chosen = jnp.array([settings.adapts(i, stack[0]) for i in range(stack[0])])
        kept["mask"] = jnp.broadcast_to(chosen.reshape((-1,) + (1,) * (len(stack) - 1)), stack)
    if settings.has_magnitude:
        adapter["magnitude"] = base.norm.astype(dtype)
    return adapter, dataclasses.replace(base, **kept)


_build_jit = jax.jit(_build, static_argnums=(0, 1, 2, 3))


@functools.cache  # one program for all layers of equal kernels
def _build_at(structure: Any, shardings: tuple[NamedSharding, ...], traced: bool) -> Any:
    """Returns `_build_jit` with results of these shardings; in a traced program by their types."""
    out = jax.tree.unflatten(structure, shardings)

    def build(*arguments: Any) -> Any:
        static, arrays = arguments[:4], arguments[4:]
        return automatically(functools.partial(_build, *static), out, *arrays)

    return jax.jit(build, static_argnums=(0, 1, 2, 3), out_shardings=None if traced else out)


def _of_kernel(
    init: str, kernel: Kernel, axes: KernelAxes, rank: int, key: Array
) -> tuple[Array, ...]:
    """Returns the factors of "pissa" or "olora", as matrices."""
    factors = singular_vectors if init == "pissa" else _orthogonal_basis
    return with_rank(factors(as_matrices(dense(kernel), axes), rank), rank, key)


def _draw(init: str, key: Array, shape: tuple[int, ...], fan_in: int, rank: int) -> Array:
    """Returns a random `lora_a` of the given shape, `(*stack, *in, r)`."""
    if init == "gaussian":
        return jax.random.normal(key, shape) / rank
    if init == "orthogonal":
        stack = math.prod(shape) // (fan_in * rank)
        if rank > fan_in:  # orthonormal rows
            wide = jnp.linalg.qr(jax.random.normal(key, (stack, rank, fan_in)))[0]
            return jnp.swapaxes(wide, 1, 2).reshape(shape)
        return jnp.linalg.qr(jax.random.normal(key, (stack, fan_in, rank)))[0].reshape(shape)
    bound = 1 / math.sqrt(fan_in)
    # Drawn flat: the same numbers, and XLA compiles it up to six times faster.
    flat = jax.random.uniform(key, (math.prod(shape),), minval=-bound, maxval=bound)
    return flat.reshape(shape)


def as_matrices(kernel: Array, axes: KernelAxes) -> Float[Array, "*stack in out"]:
    """Returns a kernel as float32 matrices: one axis for all in axes, one for all out axes."""
    stack, inputs, outputs = (tuple(kernel.shape[i] for i in group) for group in axes)
    ordered = jnp.transpose(kernel, axes.stack + axes.inputs + axes.outputs)
    return ordered.astype(jnp.float32).reshape(*stack, math.prod(inputs), math.prod(outputs))


def singular_vectors(
    kernel: Float[Array, "*stack in out"], rank: int
) -> tuple[Float[Array, "*stack in r"], Float[Array, "*stack r out"]]:
    """Returns `U sqrt(S)` and `sqrt(S) V^T` of the largest singular values (PiSSA, eq. 2 and 3)."""
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


def _orthogonal_basis(
    kernel: Float[Array, "*stack in out"], rank: int
) -> tuple[Float[Array, "*stack in r"], Float[Array, "*stack r out"]]:
    """Returns the first columns of Q and the first rows of R of `W0 = Q R` (OLoRA, section 3)."""
    q, r = jnp.linalg.qr(kernel)
    return q[..., :rank], r[..., :rank, :]


def with_rank(
    factors: tuple[Float[Array, "*stack in k"], Float[Array, "*stack k out"]], rank: int, key: Array
) -> tuple[Float[Array, "*stack in r"], Float[Array, "*stack r out"]]:
    """Returns factors of a rank above the kernel's smaller side, with the same product.

    The kernel has no further directions: those of `lora_a` are drawn, and their `lora_b` is zero.
    """
    a, b = factors
    if (more := rank - a.shape[-1]) <= 0:
        return factors
    *stack, fan_in, _ = a.shape
    drawn = _draw("kaiming_uniform", key, (*stack, fan_in, more), fan_in, more)
    zero = jnp.zeros((*stack, more, b.shape[-1]))
    return jnp.concatenate([a, drawn], axis=-1), jnp.concatenate([b, zero], axis=-2)


def _warn_of_zero_columns(name: str, norm: Array) -> None:
    if isinstance(norm, jax.core.Tracer):
        return
    if zeros := int(_count_zeros(norm) if spans_processes(norm) else np.sum(np.asarray(norm) == 0)):
        warnings.warn(
            f"{name}: {zeros} of {norm.size} columns of the kernel are exactly zero; "
            "they have no direction and stay zero",
            stacklevel=2,
        )


@jax.jit
def _count_zeros(norm: Array) -> Array:
    """Returns a number that every process knows, of an array that none of them holds whole."""
    return jnp.sum(norm == 0)
