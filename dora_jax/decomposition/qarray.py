"""Kernels that qwix quantised, which are read by their attributes: qwix need not be installed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dora_jax.decomposition.quantized import FORMATS, QuantizedKernel
from dora_jax.errors import LayoutError, Path, layer_name

_FORMATS = {"int4": "int4", "int8": "int8", "float8_e4m3fn": "fp8", "nf4": "nf4"}


def is_qarray(x: Any) -> bool:
    """Returns whether a value is a `QArray` of qwix, or a record around one (`WithAux`)."""
    inner = getattr(x, "array", x)
    return hasattr(inner, "qvalue") and hasattr(inner, "scale") and hasattr(inner, "zero_point")


def kernel_of_qarray(path: Path, x: Any) -> QuantizedKernel:
    """Returns the kernel `(qvalue - zero_point) * scale` with the same codes, nothing rounded.

    Args:
      path: of the kernel, for errors.
      x: see `is_qarray`. A scale stands for one code or a block of codes along each axis.

    Raises:
      LayoutError: codes of a type that `dora_jax.quantize` does not have, or blocks of different
        lengths; names the kernel.
    """
    array = getattr(x, "array", x)
    codes, scales, zero = array.qvalue, array.scale, array.zero_point
    kind = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype or codes).name
    if kind not in _FORMATS:
        raise LayoutError(
            f"{layer_name(path)} is quantised to {kind}: quantise it to {', '.join(_FORMATS)}"
        )
    blocks = {
        size // number
        for size, number in zip(codes.shape, scales.shape, strict=True)
        if number not in (1, size)
    }
    if len(blocks) > 1 or (zero is not None and zero.shape != scales.shape):
        raise LayoutError(
            f"{layer_name(path)} has scales {scales.shape} for codes {codes.shape}: blocks of one "
            "length are read, with a zero point for each scale"
        )
    wide, format = jnp.asarray(scales, jnp.float32), _FORMATS[kind]
    return QuantizedKernel(
        jnp.asarray(codes).astype(FORMATS[format].dtype),
        wide,
        None if zero is None else -jnp.asarray(zero, jnp.float32) * wide,
        format=format,
        block=blocks.pop() if blocks else max(codes.shape, default=1),
        dtype_name=jnp.dtype(scales.dtype).name,
    )
