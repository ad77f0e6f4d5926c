"""DoRA written directly in float64 NumPy: the reference of the tests.

Kernels are `(in, out)`, or stacks of them `(stack, in, out)`; everything batches over the stack.
`W' = m V / n` with `V = W0 + s A B` and `n = ||V||` over `in`. A column of norm zero stays zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dora_jax.decomposition import KernelAxes


class Gradients(NamedTuple):
    """Of a scalar with respect to the adapter and the input."""

    lora_a: np.ndarray
    lora_b: np.ndarray
    magnitude: np.ndarray
    inputs: np.ndarray


def wide(*arrays) -> list[np.ndarray]:
    return [np.asarray(array).astype(np.float64) for array in arrays]


def norm(kernel, lora_a=None, lora_b=None, scaling: float = 0.0) -> np.ndarray:
    """Returns `||W0 + s A B||` over `in`."""
    (v,) = wide(kernel)
    if lora_a is not None:
        a, b = wide(lora_a, lora_b)
        v = v + scaling * (a @ b)
    return np.sqrt(np.square(v).sum(-2))


def merged(kernel, lora_a, lora_b, magnitude, scaling: float, divisor=None) -> np.ndarray:
    """Returns `m (W0 + s A B) / n`; `divisor` takes the place of n."""
    w, a, b, m = wide(kernel, lora_a, lora_b, magnitude)
    n = norm(w, a, b, scaling) if divisor is None else np.asarray(divisor, np.float64)
    scale = np.divide(m, n, out=np.zeros_like(n), where=n != 0)
    return (w + scaling * (a @ b)) * scale[..., None, :]


def gradients(
    inputs, kernel, lora_a, lora_b, magnitude, scaling: float, output_gradient, *, detached: bool
) -> Gradients:
    """Returns the gradients of `<output_gradient, x W'>`, derived by hand.

    With `G = x^T dY`, the gradient of W': `dm = <G, V> / n`, `dV = m/n (G - V <G, V> / n^2)`, and
    without the projection if n is held constant; `dA = s dV B^T`, `dB = s A^T dV`.
    """
    x, w, a, b, m, dy = wide(inputs, kernel, lora_a, lora_b, magnitude, output_gradient)
    v = w + scaling * (a @ b)
    n = np.sqrt(np.square(v).sum(-2))[..., None, :]
    g = np.swapaxes(x, -1, -2) @ dy
    along = (g * v).sum(-2, keepdims=True)
    projected = g if detached else g - v * along / np.square(n)
    dv = m[..., None, :] / n * projected
    return Gradients(
        lora_a=scaling * dv @ np.swapaxes(b, -1, -2),
        lora_b=scaling * np.swapaxes(a, -1, -2) @ dv,
        magnitude=(along / n)[..., 0, :],
        inputs=dy @ np.swapaxes(v * m[..., None, :] / n, -1, -2),
    )


def differences(function: Callable[[np.ndarray], float], at, step: float = 1e-5) -> np.ndarray:
    """Returns the gradient of a function of one array by central differences."""
    at = np.asarray(at, np.float64)
    result = np.empty_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        result[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return result


def as_stack_of_matrices(kernel, axes: KernelAxes) -> np.ndarray:
    """Returns a kernel of any layout as `(stack, in, out)`, one axis each."""
    groups = [[kernel.shape[i] for i in group] for group in axes]
    shape = [int(np.prod(group)) for group in groups]
    return np.transpose(kernel, [i for group in axes for i in group]).reshape(shape)


def relative_error(value, expected) -> float:
    """Returns the largest difference over the largest expected value."""
    value, expected = wide(value, expected)
    return float(np.max(np.abs(value - expected)) / np.max(np.abs(expected)))
