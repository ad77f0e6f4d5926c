"""Kernels that are quantised as they are read, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dora_jax.decomposition.quantize import quantize_like
from dora_jax.decomposition.quantized import QuantizedKernel
from dora_jax.decomposition.sharding import quantized_shardings
from dora_jax.huggingface.files import assign
from dora_jax.huggingface.parameters import Parameter, Slice
from dora_jax.huggingface.safetensors import StoredTensor

if TYPE_CHECKING:
    from dora_jax.names.name_map import NameMap


def fill_quantized(
    parameter: Parameter,
    slices: Sequence[Slice],
    names: NameMap,
    found: Mapping[str, StoredTensor],
    problems: list[str],
    advance: Callable[[int], None],
) -> QuantizedKernel | None:
    """Reads a kernel and quantises it as `parameter.value` is; a stacked one slice by slice.

    Besides the codes read so far, there is no more than one tensor and its slice. Returns None if
    there is a problem, which is added to `problems`.
    """
    like: QuantizedKernel = parameter.value
    arrays, structure = jax.tree.flatten(like)
    whole: list[Any] | None = None
    # One buffer for all: JAX lets go of what it was given when it comes to it, not at once.
    value = np.empty(slices[0].shape, parameter.dtype)
    for one in slices:
        tensor = found[one.tensor]
        parts = _read(one, names, tensor, like, value)
        if parts is None:
            problems.append(not_finite(one, parameter))
        if problems or parts is None:
            return None
        if not one.index:
            whole = parts
        else:
            whole = whole or [np.empty(x.shape, x.dtype) for x in arrays]
            for buffer, part in zip(whole, parts, strict=True):
                buffer[one.index] = np.asarray(part)
        advance(tensor.nbytes)
    kernel: QuantizedKernel = jax.tree.unflatten(structure, whole or ())
    where = parameter.sharding
    if isinstance(where, NamedSharding):
        where = quantized_shardings(kernel, where)
    return jax.block_until_ready(jax.device_put(kernel, where))


def _read(
    one: Slice, names: NameMap, tensor: StoredTensor, like: QuantizedKernel, value: Any
) -> list[Any] | None:
    """Returns the arrays of one slice, quantised out of a buffer; None if it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        assign(value, one.from_tensor(names, tensor.read()))
    if not np.isfinite(value).all():
        return None
    number = len(one.index)
    own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[number:], x.dtype), like)
    return jax.block_until_ready(jax.tree.leaves(quantize_like(value, own)))


def not_finite(one: Slice, parameter: Parameter) -> str:
    """Returns the line for a tensor that is not finite in the parameter's dtype."""
    return (
        f"{one.tensor}: NaN or infinity as {np.dtype(parameter.dtype)}. Fetch the file again, or "
        "take a wider param_dtype."
    )
