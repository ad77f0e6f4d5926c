"""How a layer's adapter starts: always so that the adapted model is the pretrained one."""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.config import AdapterSpec, ConfigError, DoRAConfig, Path
from dora_jax.decomposition import KernelAxes, describe_base

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ArrayDict = dict[str, "Array"]


def init_layer(
    config: DoRAConfig,
    spec: AdapterSpec,
    path: Path,
    key: Array,
    kernel: Float[Array, "..."] | jax.ShapeDtypeStruct,
    axes: KernelAxes,
) -> tuple[ArrayDict, ArrayDict]:
    """Returns the adapter of one layer and what it keeps of its base.

    The key of a layer depends on `key` and its path alone, so that a layer starts the same whatever
    else is adapted. An abstract kernel gives abstract arrays.

    Returns:
      `{"lora_a", "lora_b", "magnitude"}`, as far as the settings have them, and `{"norm", "row"}`
      from `describe_base`.

    Raises:
      ConfigError: the rank is above the smaller side of the kernel.

    Warns:
      UserWarning: columns of the kernel are exactly zero; they stay zero.
    """
    name = ".".join(path)
    sides = [math.prod(kernel.shape[i] for i in group) for group in (axes.inputs, axes.outputs)]
    if spec.rank > min(sides):
        raise ConfigError(
            f"{name}: rank {spec.rank} is above the smaller side of its kernel "
            f"({sides[0]} in, {sides[1]} out); lower it with rank_pattern"
        )
    build = functools.partial(_build, spec, config.init, config.adapter_dtype, axes)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(build, key, kernel)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    adapter, base = _build_jit(spec, config.init, config.adapter_dtype, axes, key, kernel)
    _warn_of_zero_columns(name, base["norm"])
    return adapter, base


def _build(
    spec: AdapterSpec, init: str, dtype: str, axes: KernelAxes, key: Array, kernel: Array
) -> tuple[ArrayDict, ArrayDict]:
    base = describe_base(kernel, axes, spec.eps)
    shapes = axes.shapes(kernel.shape, spec.rank)
    adapter = {}
    if spec.rank:
        fan_in = math.prod(kernel.shape[i] for i in axes.inputs)
        adapter["lora_a"] = _draw(init, key, shapes["lora_a"], fan_in, spec.rank).astype(dtype)
        adapter["lora_b"] = jnp.zeros(shapes["lora_b"], dtype)
    if spec.has_magnitude:
        adapter["magnitude"] = base["norm"].astype(dtype)
    return adapter, base


_build_jit = jax.jit(_build, static_argnums=(0, 1, 2, 3))


def _draw(init: str, key: Array, shape: tuple[int, ...], fan_in: int, rank: int) -> Array:
    if init == "gaussian":
        return jax.random.normal(key, shape) / rank
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _warn_of_zero_columns(name: str, norm: Array) -> None:
    if isinstance(norm, jax.core.Tracer):
        return
    if zeros := int(np.sum(np.asarray(norm) == 0)):
        warnings.warn(
            f"{name}: {zeros} of {norm.size} columns of the kernel are exactly zero; "
            "they have no direction and stay zero",
            stacklevel=2,
        )
