"""Tiny models for the tests of the experiments, filled with numbers from NumPy.

Drawing parameters with JAX compiles a program for every shape, which takes longer than the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.cases import Case, MLPShape, mlp
from experiments.models.bert import BertConfig
from experiments.models.llama_config import LlamaConfig

M = TypeVar("M", bound=nnx.Module)

SIZES = {"hidden_size": 16, "num_attention_heads": 4}
BERT = BertConfig(
    **SIZES, vocab_size=50, num_hidden_layers=1, intermediate_size=32, max_position_embeddings=12
)
LLAMA = LlamaConfig(
    **SIZES, vocab_size=40, num_hidden_layers=2, intermediate_size=24, num_key_value_heads=2
)


def filled(make: Callable[[], M], *, seed: int = 0, spread: float = 0.3) -> M:
    """The model that a function makes, with other random parameters.

    Their standard deviation is `spread`, large enough that the attention of a tiny model is far
    from uniform. Scales of normalisations are spread around 1.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed, impl="unsafe_rbg")  # its programs compile fastest
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(np.zeros(leaf.shape), leaf.dtype)
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def tiny_mlp(*, depth: int = 1) -> Case:
    """A case of the benchmark with layers of 16 features."""
    case = mlp(tokens=16, rank=2, shape=MLPShape(width=16, depth=depth))
    return dataclasses.replace(case, build=lambda: filled(case.build))
