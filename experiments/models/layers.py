"""Layers that the models have in common, made with one initialisation and one pair of dtypes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from flax import nnx

from experiments.models.partitioning import named

if TYPE_CHECKING:
    from jax.typing import DTypeLike

# Cached, because some Flax layers keep their initialiser as an attribute, and jit compiles a model
# again when that is another function.
_normal = functools.cache(nnx.initializers.normal)
_zeros = nnx.initializers.zeros_init()


class LayerFactory:
    """Makes the layers of one model.

    Args:
        config: Has `hidden_size` and `initializer_range`, the standard deviation of kernels.
        dtype: Compute dtype of the layers.
        param_dtype: Dtype of their parameters.
        rngs: Stream `params`, and `dropout` for training.
    """

    def __init__(
        self, config: Any, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.init = _normal(config.initializer_range)
        self.common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

    def linear(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        axes: tuple[str, str] | None = None,
    ) -> nnx.Linear:
        """Returns a linear layer with a normally distributed kernel.

        `axes` names the axes of the kernel, for `partitioning.RULES`.
        """
        init: dict[str, Any] = {"kernel_init": self.init}
        if axes is not None:
            init = {"kernel_init": named(self.init, axes), "bias_init": named(_zeros, axes[1:])}
        return nnx.Linear(in_features, out_features, use_bias=bias, **init, **self.common)

    def embed(self, count: int, *, axes: tuple[str, str] | None = None) -> nnx.Embed:
        """Returns a table of `count` embeddings of `hidden_size` features; `axes` as above."""
        init = self.init if axes is None else named(self.init, axes)
        return nnx.Embed(count, self.config.hidden_size, embedding_init=init, **self.common)
