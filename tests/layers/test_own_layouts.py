"""Layers of a user's own: a layout for each front end, in few lines."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.decomposition import KernelAxes
from dora_jax.layers import Layout, einsum_layout, register_layout
from tests.support.layers.errors import errors
from tests.support.layers.laws import PLAIN, assert_within
from tests.support.layers.rows import Row, axes
from tests.support.models import FRONT_ENDS


class LinenShifted(linen.Module):
    """A projection whose bias has another name."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x):
        w = self.param("w", linen.initializers.normal(), (4, 3), self.param_dtype)
        shift = self.param("shift", linen.initializers.normal(), (3,), self.param_dtype)
        return x @ w + shift


class NNXShifted(nnx.Module):
    def __init__(self, dtype=None, param_dtype=jnp.float32, *, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 3), param_dtype))
        self.shift = nnx.Param(jnp.ones(3, param_dtype))

    def __call__(self, x):
        return x @ self.w[...] + self.shift[...]


SHIFTED = {"linen": LinenShifted, "nnx": NNXShifted}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_layout_names_the_bias_which_is_not_scaled(front_end):
    layout = einsum_layout(
        lambda layer, call: "...i,io->...o", kernel="w", bias="shift", inputs="x"
    )
    dora.layers.register_layout(SHIFTED[front_end], layout)
    row = Row(
        "shifted",
        front_end,
        SHIFTED[front_end],
        x=(2, 4),
        params={"w": (4, 3), "shift": (3,)},
        kernels={"w": axes("0", "1")},
        layer=lambda params, x: x @ params["w"] + params["shift"],
    )
    assert_within(errors(row, jnp.float32, PLAIN), "float32")


class LinenOutFirst(linen.Module):
    """A dense layer that stores its weight as torch does: `(out, in)`."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x):
        return x @ self.param("weight", linen.initializers.normal(), (3, 4), self.param_dtype).T


class NNXOutFirst(nnx.Module):
    def __init__(self, dtype=None, param_dtype=jnp.float32, *, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3, 4), param_dtype))

    def __call__(self, x):
        return x @ self.weight[...].T


@dataclasses.dataclass(frozen=True)
class OutFirstLayout(Layout):
    """A kernel `(out, in)`."""

    kernel: str = "weight"
    inputs: str = "x"

    def axes(self, layer, arguments):
        return KernelAxes(stack=(), inputs=(1,), outputs=(0,))

    def low_rank(self, call, branch):
        a, b = branch.factors()
        return (call.arguments["x"].astype(branch.dtype) @ a) @ b


def register_out_first():
    register_layout(LinenOutFirst, OutFirstLayout())
    register_layout(NNXOutFirst, OutFirstLayout())


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_new_layer_class_is_adapted_in_both_front_ends_by_a_layout_of_few_lines(front_end):
    register_out_first()
    lines = [inspect.getsource(part).strip() for part in (OutFirstLayout, register_out_first)]
    assert len("\n".join(lines).splitlines()) <= 20
    row = Row(
        "out first",
        front_end,
        {"linen": LinenOutFirst, "nnx": NNXOutFirst}[front_end],
        x=(2, 4),
        params={"weight": (3, 4)},
        kernels={"weight": axes("1", "0")},
        layer=lambda params, x: x @ params["weight"].T,
    )
    assert_within(errors(row, jnp.float32, ("plain", "scan"), detached=PLAIN), "float32")
