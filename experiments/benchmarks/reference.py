"""LoRA and DoRA written by hand, for comparison with the layers of the library."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

import dora_jax as dora

if TYPE_CHECKING:
    from jaxtyping import Array, Float

M = TypeVar("M", bound=nnx.Module)


class LoRAByHand(nnx.Module):
    """LoRA, `y = x W + s (x A) B + b`.

    Args:
        linear: The frozen layer. Its kernel may have a leading axis for a scan over layers.
        rank: Rank r of `lora_a (*stack, in, r)` and `lora_b (*stack, r, out)`, float32.
        alpha: The scaling is `alpha / rank`.
        rngs: Draws `lora_a`, uniform in `±1 / sqrt(in)`. `lora_b` starts at zero.
    """

    def __init__(self, linear: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        *stack, features_in, features_out = linear.kernel.shape
        bound = features_in**-0.5
        shape = (*stack, features_in, rank)
        self.linear = linear
        self.scaling = alpha / rank
        self.lora_a = dora.DoRAParam(
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        )
        self.lora_b = dora.DoRAParam(jnp.zeros((*stack, rank, features_out)))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Returns the adapted output in the layer's compute dtype."""
        x, kernel, a, b, bias = self._in_compute_dtype(x)
        y = x @ kernel + (self.scaling * (x @ a)) @ b
        return y if bias is None else y + bias

    def _in_compute_dtype(self, x: Array) -> tuple[Array, Array, Array, Array, Array | None]:
        linear = self.linear
        dtype = linear.dtype or jnp.result_type(x, linear.kernel)
        bias = None if linear.bias is None else linear.bias[...].astype(dtype)
        arrays = (linear.kernel[...], self.lora_a[...], self.lora_b[...])
        kernel, a, b = (array.astype(dtype) for array in arrays)
        return x.astype(dtype), kernel, a, b, bias


class DoRAMaterialized(LoRAByHand):
    """DoRA as it is defined, `y = x (m (W + s A B) / ||W + s A B||) + b`.

    Source: arXiv 2402.09353, equation 5. Computes a matrix of the kernel's size in every call.
    `magnitude (*stack, out)`, float32, starts at `||W||`.
    """

    def __init__(self, linear: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        super().__init__(linear, rank, alpha, rngs)
        wide = linear.kernel[...].astype(jnp.float32)
        self.magnitude = dora.DoRAParam(jnp.linalg.norm(wide, axis=-2))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Returns the adapted output in the layer's compute dtype."""
        x, _, _, _, bias = self._in_compute_dtype(x)
        kernel = self.linear.kernel[...].astype(jnp.float32)
        direction = kernel + self.scaling * self.lora_a[...] @ self.lora_b[...]
        norm = jnp.linalg.norm(direction, axis=-2)
        y = x @ (self.magnitude[...] / norm * direction).astype(x.dtype)
        return y if bias is None else y + bias


def replace_linears(
    model: M, layer: type[LoRAByHand], targets: str, *, rank: int, alpha: float, rngs: nnx.Rngs
) -> M:
    """Returns a copy of a model with other linear layers. The copy has the same arrays.

    Args:
        model: Any NNX model whose layers are attributes or members of an `nnx.List`.
        layer: The class of the new layers.
        targets: A regular expression for the whole dotted path of a replaced layer.
        rank, alpha, rngs: Arguments of `layer`.
    """
    model = nnx.clone(model)
    modules = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        if isinstance(module, nnx.Linear) and re.fullmatch(targets, ".".join(map(str, path))):
            new = layer(module, rank, alpha, rngs)
            parent: Any = modules[path[:-1]]
            name: Any = path[-1]
            if isinstance(parent, nnx.List):
                parent[name] = new
            else:
                setattr(parent, str(name), new)
    return model
