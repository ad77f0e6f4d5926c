"""Flax layers by their definitions, in float64 NumPy: each is `layer(params, x) -> y`.

`params` are nested dicts as in Flax. Convolutions take `x` as `(*batch, *space, features)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Params = Mapping[str, Any]
Layer = Callable[[Params, np.ndarray], np.ndarray]


def contraction(equation: str, bias_shape: Sequence[int] | None = None, kernel="kernel") -> Layer:
    """Returns `einsum(equation, x, kernel) + bias`; the bias is broadcast from `bias_shape`."""

    def layer(params: Params, x: np.ndarray) -> np.ndarray:
        y = np.einsum(equation, x, params[kernel])
        return y if bias_shape is None else y + params["bias"].reshape(bias_shape)

    return layer


def convolution(
    strides: int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: int = 1,
    input_dilation: int = 1,
    groups: int = 1,
) -> Layer:
    """Returns `y[p] = bias + sum over k of x[p * strides + k * dilation] kernel[k]` (padded x)."""

    def layer(params: Params, x: np.ndarray) -> np.ndarray:
        kernel = params["kernel"]
        sizes = kernel.shape[:-2]
        x, batch = _one_batch_axis(x, len(sizes))
        x = _pad(_spread(x, input_dilation), sizes, strides, padding, dilation)
        space = [
            (n - (k - 1) * dilation - 1) // strides + 1
            for n, k in zip(x.shape[1:-1], sizes, strict=True)
        ]
        y = np.zeros((len(x), *space, kernel.shape[-1]))
        for offset in np.ndindex(*sizes):
            window = x[
                (
                    slice(None),
                    *(
                        slice(o * dilation, o * dilation + (n - 1) * strides + 1, strides)
                        for o, n in zip(offset, space, strict=True)
                    ),
                )
            ]
            for g in range(groups):
                inputs, outputs = (slice(g * n, (g + 1) * n) for n in _group(kernel, groups))
                y[..., outputs] += window[..., inputs] @ kernel[offset][:, outputs]
        return y.reshape(*batch, *y.shape[1:]) + params.get("bias", 0)

    return layer


def transposed_convolution(
    strides: int = 1, padding: str = "SAME", dilation: int = 1, transpose_kernel: bool = False
) -> Layer:
    """Returns `y[p * strides + k * dilation - crop] += x[p] kernel[k]`, plus bias.

    With `transpose_kernel` the kernel is stored as `(*space, out, in)`; without, its space axes are
    reversed first.
    """

    def layer(params: Params, x: np.ndarray) -> np.ndarray:
        kernel = params["kernel"]
        space = kernel.ndim - 2
        if transpose_kernel:
            kernel = np.swapaxes(kernel, -1, -2)
        else:
            kernel = np.flip(kernel, tuple(range(space)))
        x, batch = _one_batch_axis(x, space)
        spans = [(k - 1) * dilation + 1 for k in kernel.shape[:space]]
        crops, sizes = zip(
            *(
                _transposed_window(n, span, strides, padding, transpose_kernel)
                for n, span in zip(x.shape[1:-1], spans, strict=True)
            ),
            strict=True,
        )
        y = np.zeros((len(x), *sizes, kernel.shape[-1]))
        for at in np.ndindex(*x.shape[1:-1]):
            for k in np.ndindex(*kernel.shape[:space]):
                to = [p * strides + o * dilation - c for p, o, c in zip(at, k, crops, strict=True)]
                if padding == "CIRCULAR":
                    to = [t % n for t, n in zip(to, sizes, strict=True)]
                if all(0 <= t < n for t, n in zip(to, sizes, strict=True)):
                    y[(slice(None), *to)] += x[(slice(None), *at)] @ kernel[k]
        return y.reshape(*batch, *y.shape[1:]) + params.get("bias", 0)

    return layer


def lookup(params: Params, ids: np.ndarray) -> np.ndarray:
    return params["embedding"][ids]


def attend(params: Params, x: np.ndarray) -> np.ndarray:
    return x @ params["embedding"].T


def tied(params: Params, ids: np.ndarray) -> np.ndarray:
    """A language model of one table: looked up, and used again as the head."""
    return attend(params, np.tanh(lookup(params, ids)))


def attention(params: Params, x: np.ndarray) -> np.ndarray:
    """Self-attention with several heads, of `x (batch, time, features)`."""
    q, k, v = (
        np.einsum("btf,fhd->bthd", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshd->bthd", weights, v)
    return np.einsum("bthd,hdf->btf", mixed, params["out"]["kernel"]) + params["out"]["bias"]


def lstm(params: Params, x: np.ndarray) -> np.ndarray:
    """LSTM over `x (time, batch, in)`; the gates are i, f, g, o, or joined in that order."""
    params = {name.rstrip("_"): inner for name, inner in params.items()}  # NNX has `if_`
    h = c = np.zeros((x.shape[1], _columns(params, "hi", 4)))
    outputs = []
    for x_t in x:
        i, f, g, o = _gates(params, x_t, h, "ifgo")
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


def gru(params: Params, x: np.ndarray) -> np.ndarray:
    """GRU over `x (time, batch, in)`; the gates are r, z, n, or joined in that order."""
    h = np.zeros((x.shape[1], _columns(params, "hr", 3)))
    outputs = []
    for x_t in x:
        (xr, xz, xn), (hr, hz, hn) = (
            [_affine(params[side + gate], value) for gate in "rzn"]
            if "ir" in params
            else np.split(_affine(params[f"dense_{side}"], value), 3, -1)
            for side, value in (("i", x_t), ("h", h))
        )
        z = _sigmoid(xz + hz)
        h = (1 - z) * np.tanh(xn + _sigmoid(xr + hr) * hn) + z * h
        outputs.append(h)
    return np.stack(outputs)


def _gates(params: Params, x: np.ndarray, h: np.ndarray, gates: str) -> list[np.ndarray]:
    if "dense_i" in params:
        joined = _affine(params["dense_i"], x) + _affine(params["dense_h"], h)
        return np.split(joined, len(gates), -1)
    return [_affine(params["i" + gate], x) + _affine(params["h" + gate], h) for gate in gates]


def _columns(params: Params, name: str, joined: int) -> int:
    """The number of hidden features."""
    if name in params:
        return params[name]["kernel"].shape[-1]
    return params["dense_h"]["kernel"].shape[-1] // joined


def _affine(params: Params, x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params.get("bias", 0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _one_batch_axis(x: np.ndarray, space: int) -> tuple[np.ndarray, tuple[int, ...]]:
    batch = x.shape[: x.ndim - space - 1]
    return x.reshape(-1, *x.shape[len(batch) :]), batch


def _group(kernel: np.ndarray, groups: int) -> tuple[int, int]:
    """The input and output features of one group."""
    return kernel.shape[-2], kernel.shape[-1] // groups


def _spread(x: np.ndarray, step: int) -> np.ndarray:
    """Puts `step - 1` zeros between neighbours, along every space axis."""
    shape = [(n - 1) * step + 1 for n in x.shape[1:-1]]
    wide = np.zeros((len(x), *shape, x.shape[-1]))
    wide[(slice(None), *(slice(None, None, step) for _ in shape))] = x
    return wide


def _pad(
    x: np.ndarray,
    sizes: Sequence[int],
    strides: int,
    padding: str | Sequence[tuple[int, int]],
    dilation: int,
) -> np.ndarray:
    spans = [(k - 1) * dilation + 1 for k in sizes]
    mode = "constant"
    if not isinstance(padding, str):
        pads = list(padding)
    elif padding in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        pads = [((span - 1) // 2, span // 2) for span in spans]
    elif padding == "CAUSAL":
        pads = [(span - 1, 0) for span in spans]
    elif padding == "SAME":
        totals = [
            max((math.ceil(n / strides) - 1) * strides + span - n, 0)
            for n, span in zip(x.shape[1:-1], spans, strict=True)
        ]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(0, 0) for _ in spans]
    return np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)  # type: ignore[call-overload]


def _transposed_window(
    size: int, span: int, strides: int, padding: str, transpose_kernel: bool
) -> tuple[int, int]:
    """Returns where the output of a transposed convolution starts, and its size, on one axis."""
    full = (size - 1) * strides + span
    if padding == "VALID":
        return 0, full + max(strides - span, 0)
    if padding == "SAME":
        # Half of what is too much on either side, the odd one on the left.
        surplus = span + strides - 2
        return (0 if strides > span - 1 else span - 1 - math.ceil(surplus / 2)), size * strides
    # Circular: the output is one period; what reaches over its ends is wrapped around.
    period = size * strides
    surplus = -(full + max(strides - span, 0) - period) % (2 * period)
    return -(surplus // 2 if transpose_kernel else (surplus + 1) // 2), period
