"""Kernels of a GGUF file, the format of llama.cpp, kept in its own 4 or 8 bits.

A row of a GGUF matrix is an output feature, in blocks of 32 input features with a scale in float16.
`QuantizedKernel` has the same blocks along its in axis, so nothing is rounded:

    Q4_0   d (q - 8), q of 4 bits        "int4"
    Q4_1   d q + m, q of 4 bits          "uint4", with the offsets m
    Q8_0   d q, q of 8 bits              "int8"
    F16, F32, and any other              not kept: dequantised
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax.decomposition import QuantizedKernel

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Shaped

M = TypeVar("M", bound=nnx.Module)
Reorder = Callable[["Shaped[np.ndarray, 'out in']"], "Shaped[np.ndarray, 'out in']"]

_BLOCK = 32
# Bytes before the codes of a block: a scale, and of Q4_1 an offset.
_HEAD = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}
_FORMATS = {"Q4_0": "int4", "Q4_1": "uint4", "Q8_0": "int8"}


def read_kernel(
    tensor: Any, reorder: Reorder | None = None, dtype: DTypeLike = jnp.float32
) -> QuantizedKernel | Float[Array, "in out"]:
    """Returns a matrix of a GGUF file as a kernel, in its own bits if its type is one of the three.

    Args:
        tensor: Of `gguf.GGUFReader(...).tensors`; a matrix.
        reorder: Takes what has a row for each output feature, and returns its rows in the model's
            order (`half_rotated` for q and k).
        dtype: Of the dequantised kernel.

    Raises:
        ValueError: The tensor is no matrix.
    """
    import gguf

    if len(tensor.shape) != 2:
        raise ValueError(f"{tensor.name}: a kernel is a matrix, and this has shape {tensor.shape}")
    reorder = reorder or (lambda rows: rows)
    kind = tensor.tensor_type.name
    if kind not in _FORMATS:
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        return jnp.asarray(reorder(whole).T, dtype)
    codes, scales, offsets = (None if x is None else reorder(x).T for x in _parts(tensor, kind))
    return QuantizedKernel(
        jnp.asarray(codes, jnp.int4 if kind == "Q4_0" else jnp.uint4 if kind == "Q4_1" else None),
        jnp.asarray(scales, jnp.float32),
        None if offsets is None else jnp.asarray(offsets, jnp.float32),
        format=_FORMATS[kind],
        block=_BLOCK,
        dtype_name=jnp.dtype(dtype).name,
    )


def _parts(tensor: Any, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns codes, scales and offsets, each with a row for each output feature."""
    rows = tensor.data.shape[0]
    head, size = _HEAD[kind], _BLOCK if kind == "Q8_0" else _BLOCK // 2
    blocks = np.ascontiguousarray(tensor.data).reshape(rows, -1, head + size)
    numbers = np.ascontiguousarray(blocks[..., :head]).view(np.float16).astype(np.float32)
    packed = np.ascontiguousarray(blocks[..., head:])
    if kind == "Q8_0":
        codes = packed.view(np.int8)
    else:  # the low halves of the bytes are the first 16 codes
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
        if kind == "Q4_0":
            codes = codes.astype(np.int8) - 8
    offsets = numbers[..., 1] if kind == "Q4_1" else None
    return codes.reshape(rows, -1), numbers[..., 0], offsets


def with_kernels_of(
    model: M, packed: Path, find: Callable[[str], tuple[tuple[str, ...], Reorder | None] | None]
) -> M:
    """Gives the linear layers of a model the kernels of a GGUF file, in its bits, in place.

    Layers that are stacked along a leading axis get stacks.

    Args:
        model: Has the parameters of the file, dequantised, in the dtype of the result.
        packed: The file.
        find: Takes the name of a tensor, and returns the path of its layer in the model with the
            number of a decoder layer second (`("layers", "3", "mlp", "up_proj")`), and how its rows
            are reordered; None for a tensor that is not to be kept in bits.

    Raises:
        ValueError: The kernels of a stack are not all in 4 or 8 bits, and of one type.
    """
    import gguf

    found: dict[tuple[str, ...], dict[int, Any]] = {}
    for tensor in gguf.GGUFReader(packed).tensors:
        if (place := find(tensor.name)) is None or tensor.tensor_type.name not in _FORMATS:
            continue
        (group, number, *rest), reorder = place
        found.setdefault((group, *rest), {})[int(number)] = (tensor, reorder)
    for (group, *rest), layers in found.items():
        own = getattr(model, group)
        if isinstance(own, nnx.List):
            for index, (tensor, reorder) in layers.items():
                kernel = _kernel(own[index], rest)
                kernel.set_value(read_kernel(tensor, reorder, kernel.get_value().dtype))
            continue
        kernel = _kernel(own, rest)
        dtype, size = kernel.get_value().dtype, len(kernel.get_value())
        kernels = [read_kernel(x, reorder, dtype) for _, (x, reorder) in sorted(layers.items())]
        if len(kernels) != size or len({jax.tree.structure(one) for one in kernels}) > 1:
            kinds = sorted({tensor.tensor_type.name for tensor, _ in layers.values()})
            raise ValueError(
                f"{group}.{'.'.join(rest)}: of {size} layers {len(kernels)} are in 4 or 8 bits "
                f"({', '.join(kinds)}), and a stack needs all in one type: scan_layers=False"
            )
        kernel.set_value(jax.tree.map(lambda *x: jnp.stack(x), *kernels))
    return model


def _kernel(module: Any, names: list[str]) -> nnx.Variable:
    for name in names:
        module = getattr(module, name)
    return module.kernel
