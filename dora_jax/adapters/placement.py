"""Arrays between the host and the devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dora_jax.adapters.origin import origin_of, remember
from dora_jax.processes import spans_processes


def device_put_like(value: Any, like: Any) -> Any:
    """Returns a value on the devices, and in the sharding, of another array of the same shape.

    In a run of several processes, each one writes the shards of its own devices. Where `like` is a
    NumPy array, the value stays on the host.
    """
    if spans_processes(value):  # it was read into that sharding
        return value
    if not isinstance(like, jax.Array):
        return value if isinstance(like, np.ndarray | np.generic) else jnp.asarray(value)
    if not like.committed:
        return jnp.asarray(value)
    if is_random_key(like):
        return jax.device_put(value, like.sharding)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])


def own_array(x: Any, dtype: Any = None) -> Any:
    """Returns a copy of an array, in a dtype if one is given, that shares its memory with nothing.

    So a step that donates the copy, or code that writes into it, leaves the original whole. The
    copy of a NumPy array is a `jax.Array`. Inside a transformation, whose arrays have no memory of
    their own yet, and for abstract arrays nothing is copied.
    """
    copy = _copy(x, dtype)
    if (known := origin_of(x)) is not None:
        remember({("lora_b",): copy}, {(): known})
    return copy


def _copy(x: Any, dtype: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        return jnp.array(native(x), dtype)
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return x if dtype is None else jnp.asarray(x, dtype)
    with jax.ensure_compile_time_eval():
        if dtype is not None and x.dtype != dtype:
            return x.astype(dtype)
        if not x.is_fully_addressable:
            return jnp.copy(x)
        # Compiles nothing, unlike `jnp.copy`, which compiles a program for every shape.
        return jax.device_put(x, x.sharding if x.committed else None, may_alias=False)


def native(x: Any) -> Any:
    """Returns an array in the byte order of this machine, the only one that JAX reads."""
    if isinstance(x, np.ndarray) and not x.dtype.isnative:
        return x.astype(x.dtype.newbyteorder("="))
    return x


def host_value(x: Any) -> np.ndarray:
    """Returns an array on the host, if one process holds it; for a random key, its data."""
    return np.asarray(jax.random.key_data(x) if is_random_key(x) else x)


def is_random_key(x: Any) -> bool:
    """Returns whether an array holds typed random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
