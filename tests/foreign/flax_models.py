"""Flax's own layers and transforms, in Linen, in NNX and across the bridge between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from tests.foreign.harness import LinenCase, NNXCase

X = jax.random.normal(jax.random.key(5), (2, 6, 16))
IMAGES = jax.random.normal(jax.random.key(6), (4, 8, 8, 3))
ATTENTION = {
    **{name: dora.decomposition.KernelAxes((), (0,), (1, 2)) for name in ("query", "key", "value")},
    "out": dora.decomposition.KernelAxes((), (0, 1), (2,)),
}
SCANNED_ATTENTION = {
    **{
        name: dora.decomposition.KernelAxes((0,), (1,), (2, 3))
        for name in ("query", "key", "value")
    },
    "out": dora.decomposition.KernelAxes((0,), (1, 2), (3,)),
}
CONV = dora.decomposition.KernelAxes((), (0, 1, 2), (3,))
WITH_CONV = dora.DoRAConfig(rank=2, alpha=4.0, target_modules=["conv_0", "conv_1", "head"])


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(16, name="down")(y), None


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = scanned(name="blocks")(x, None)
        return nn.Dense(5, name="head")(x)


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NNXScanned(nnx.Module):
    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def blocks(rngs):
            return NNXBlock(rngs=rngs)

        self.blocks = blocks(rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, x))


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in range(2):
            x = nn.Conv(8, (3, 3), name=f"conv_{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5, name="head")(jnp.mean(x, (1, 2)))


class NNXConvNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv_0, self.norm_0 = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.conv_1, self.norm_1 = nnx.Conv(8, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm_0(self.conv_0(x)))
        x = nnx.relu(self.norm_1(self.conv_1(x)))
        return self.head(jnp.mean(x, (1, 2)))


class LinenRNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.RNN(nn.LSTMCell(8))(x))


class NNXRNN(nnx.Module):
    def __init__(self, cell, *, rngs):
        self.rnn = nnx.RNN(cell)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class HalfLinen(nnx.Module):
    """An NNX model with a Linen module inside."""

    def __init__(self, *, rngs):
        self.inner = nnx.bridge.ToNNX(nn.Dense(16), rngs=rngs).lazy_init(X)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.inner(x)))


class HalfNNX(nn.Module):
    """A Linen model with an NNX module inside."""

    @nn.compact
    def __call__(self, x):
        x = nnx.bridge.ToLinen(nnx.Linear, args=(16, 16))(x)
        return nn.Dense(5, name="head")(nn.gelu(x))


def attention() -> NNXCase:
    model: Any = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    return NNXCase(model, (X,), axes=ATTENTION)


def nnx_rnn() -> NNXCase:
    rngs = nnx.Rngs(0)
    return NNXCase(NNXRNN(nnx.LSTMCell(16, 8, rngs=rngs), rngs=rngs), (X,))


CASES: dict[str, Callable[[], LinenCase | NNXCase]] = {
    "flax nnx.MultiHeadAttention": attention,
    "flax nn.scan, nn.remat": lambda: LinenCase(LinenScanned(), (X,), axes=SCANNED_ATTENTION),
    "flax nnx.scan, nnx.remat": lambda: NNXCase(
        NNXScanned(rngs=nnx.Rngs(0)), (X,), axes=SCANNED_ATTENTION
    ),
    "flax Conv, BatchNorm (Linen)": lambda: LinenCase(
        LinenConvNet(),
        (IMAGES,),
        WITH_CONV,
        train_kwargs={"train": True},
        axes={"conv_0": CONV, "conv_1": CONV},
        mutable=("batch_stats",),
    ),
    "flax Conv, BatchNorm (NNX)": lambda: NNXCase(
        NNXConvNet(rngs=nnx.Rngs(0)), (IMAGES,), WITH_CONV, axes={"conv_0": CONV, "conv_1": CONV}
    ),
    "flax RNN, LSTMCell (Linen)": lambda: LinenCase(LinenRNN(), (X,)),
    "flax RNN, LSTMCell (NNX)": nnx_rnn,
    "flax nnx.bridge.ToNNX inside": lambda: NNXCase(HalfLinen(rngs=nnx.Rngs(0)), (X,)),
    "flax nnx.bridge.ToLinen inside": lambda: LinenCase(HalfNNX(), (X,)),
}
