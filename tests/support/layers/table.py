"""The layer types of Flax, and those that cannot be adapted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import dora_jax as dora
from dora_jax.layers import einsum_layout
from tests.support.layers import definitions as by_definition
from tests.support.layers.rows import (
    Row,
    axes,
    both,
    conv,
    conv_transpose,
    einsum,
    recurrent,
    unroll,
)

partial = functools.partial


class LinenProjection(linen.Module):
    """A layer of a user's own: a weight and an equation that is given with each call."""

    shape: tuple[int, ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, equation, x):
        w = self.param("w", linen.initializers.normal(), self.shape, self.param_dtype)
        return jnp.einsum(equation, x, w)


class NNXProjection(nnx.Module):
    def __init__(self, shape, *, dtype=None, param_dtype=jnp.float32, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


for _projection in (LinenProjection, NNXProjection):
    dora.layers.register_layout(
        _projection,
        einsum_layout(lambda layer, call: call["equation"], kernel="w", inputs="x"),
    )


def _lstm(suffix: str) -> dict[str, Any]:
    gates = {"i": "i", "f": "f" + suffix, "g": "g", "o": "o"}
    return {f"i{gate}": (4, 3) for gate in gates.values()} | {f"h{g}": (3, 3, True) for g in gates}


def _linen_gru() -> dict[str, Any]:
    return {
        **{f"i{gate}": (4, 3, True) for gate in "rzn"},
        "hr": (3, 3),
        "hz": (3, 3),
        "hn": (3, 3, True),
    }


HEADS = {
    **{f"{name}.kernel": (6, 2, 3) for name in ("query", "key", "value")},
    **{f"{name}.bias": (2, 3) for name in ("query", "key", "value")},
    "out.kernel": (2, 3, 6),
    "out.bias": (6,),
}

# The table: the layer types of Flax and one of a user's own.
ROWS: list[Row] = [
    *both(
        "Dense / Linear",
        linen=partial(linen.Dense, 5),
        nnx=partial(nnx.Linear, 4, 5),
        x=(3, 4),
        params={"kernel": (4, 5), "bias": (5,)},
        kernels={"kernel": axes("0", "1")},
        layer=by_definition.contraction("bi,io->bo", (5,)),
    ),
    *both(
        "DenseGeneral / LinearGeneral, two axes in and out",
        linen=partial(linen.DenseGeneral, (2, 3), axis=(1, -1)),
        nnx=partial(nnx.LinearGeneral, (3, 4), (2, 3), axis=(1, -1)),
        x=(2, 3, 5, 4),
        params={"kernel": (3, 4, 2, 3), "bias": (2, 3)},
        kernels={"kernel": axes("01", "23")},
        layer=by_definition.contraction("bixj,ijop->bxop", (1, 1, 2, 3)),
    ),
    *both(
        "DenseGeneral / LinearGeneral, batch axis",
        linen=partial(linen.DenseGeneral, (2, 3), axis=-1, batch_dims=(0,)),
        nnx=partial(nnx.LinearGeneral, 4, (2, 3), axis=-1, batch_axis={0: 2}),
        x=(2, 3, 4),
        params={"kernel": (2, 4, 2, 3), "bias": (2, 2, 3)},
        kernels={"kernel": axes("1", "23", "0")},
        layer=by_definition.contraction("bxi,biop->bxop", (2, 1, 2, 3)),
    ),
    *einsum("btd,hdk->bkth", (2, 3, 4), (2, 4, 3), axes("1", "02"), (1, 3, 1, 2)),
    *einsum("bed,edf->bef", (3, 2, 4), (2, 4, 3), axes("1", "2", "0"), (1, 2, 3)),
    *both(
        "a user's Einsum, equation in the call",
        linen=partial(LinenProjection, (2, 4, 3)),
        nnx=partial(NNXProjection, (2, 4, 3)),
        x=(5, 4),
        params={"w": (2, 4, 3)},
        kernels={"w": axes("1", "02")},
        layer=by_definition.contraction("td,edf->tef", kernel="w"),
        call=lambda layer, x: layer("td,edf->tef", x),
        traced=True,
    ),
    *conv((2, 5, 4, 4), (3, 2, 2, 4), "Conv", strides=2, feature_group_count=2),
    *conv_transpose((2, 3, 3), (4, 3, 4), "ConvTranspose", strides=2),
    *conv_transpose(
        (2, 3, 3), (4, 4, 3), "ConvTranspose, transpose_kernel", strides=3, transpose_kernel=True
    ),
    *both(
        "Embed",
        linen=partial(linen.Embed, 6, 4),
        nnx=partial(nnx.Embed, 6, 4),
        x=(2, 3),
        params={"embedding": (6, 4)},
        kernels={"embedding": axes("0", "1")},
        layer=by_definition.lookup,
        vocab=6,
    ),
    *both(
        "Embed, lookup and attend tied",
        linen=partial(linen.Embed, 6, 4),
        nnx=partial(nnx.Embed, 6, 4),
        x=(2, 3),
        params={"embedding": (6, 4)},
        kernels={"embedding": axes("0", "1")},
        layer=by_definition.tied,
        call=lambda layer, ids: layer.attend(jnp.tanh(layer(ids))),
        vocab=6,
    ),
    *both(
        "MultiHeadAttention",
        linen=partial(linen.MultiHeadDotProductAttention, num_heads=2),
        nnx=partial(nnx.MultiHeadAttention, num_heads=2, in_features=6, decode=False),
        x=(2, 3, 6),
        params=HEADS,
        kernels={"query.kernel": axes("0", "12"), "out.kernel": axes("01", "2")},
        layer=by_definition.attention,
    ),
    recurrent(
        "LSTMCell", "linen", partial(linen.LSTMCell, 3), _lstm(""), ["if", "hg"], by_definition.lstm
    ),
    recurrent(
        "LSTMCell",
        "nnx",
        partial(nnx.LSTMCell, 4, 3),
        _lstm("_"),
        ["if_", "hg"],
        by_definition.lstm,
    ),
    recurrent(
        "OptimizedLSTMCell",
        "nnx",
        partial(nnx.OptimizedLSTMCell, 4, 3),
        {"dense_i": (4, 12), "dense_h": (3, 12, True)},
        ["dense_i", "dense_h"],
        by_definition.lstm,
    ),
    recurrent(
        "GRUCell", "linen", partial(linen.GRUCell, 3), _linen_gru(), ["in", "hr"], by_definition.gru
    ),
    recurrent(
        "GRUCell",
        "nnx",
        partial(nnx.GRUCell, 4, 3),
        {"dense_i": (4, 9, True), "dense_h": (3, 9)},
        ["dense_i", "dense_h"],
        by_definition.gru,
    ),
]

SINGLE = [row for row in ROWS if len(row.kernels) == 1]
COMPOSED = [row for row in ROWS if len(row.kernels) > 1]  # attention and recurrent cells


class LinenOwnCall(linen.Dense):
    """Its argument has another name: nothing may take the call for that of a Dense."""

    @linen.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class NNXOwnCall(nnx.Linear):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class LinenOwnAttend(linen.Embed):
    def attend(self, query):
        return super().attend(query) / 2


class NNXOwnAttend(nnx.Embed):
    def attend(self, *args, **kwargs):
        return super().attend(*args, **kwargs) / 2


def refused(name: str, front_end: str, make: Callable[..., Any], x, reason: str, **fields: Any):
    return Row(name, front_end, make, x, refused=reason, **fields)


MASK = jnp.tri(3).reshape(3, 3, 1)
OWN = r"OwnCall has a method __call__ of its own.*register_layout\("
ATTEND = r"OwnAttend has a method attend of its own.*register_layout\("
LORA = r"low-rank adapter already: merge it"

# What cannot be adapted, and says so.
UNSUPPORTED: list[Row] = [
    refused("ConvLocal", "linen", partial(linen.ConvLocal, 4, (3,)), (2, 5, 3), "at each position"),
    refused(
        "Conv with a mask", "linen", partial(linen.Conv, 1, (3,), mask=MASK), (2, 5, 3), "a mask"
    ),
    refused(
        "Conv with a mask", "nnx", partial(nnx.Conv, 3, 1, (3,), mask=MASK), (2, 5, 3), "a mask"
    ),
    refused(
        "OptimizedLSTMCell",
        "linen",
        partial(linen.OptimizedLSTMCell, 3),
        (2, 3, 4),
        r"OptimizedLSTMCell joins the kernels of its gates.*: use LSTMCell",
        call=unroll,
    ),
    refused("LoRALinear", "nnx", partial(nnx.LoRALinear, 4, 5, lora_rank=2), (3, 4), LORA),
    refused("a subclass with its own call", "linen", partial(LinenOwnCall, 5), (3, 4), OWN),
    refused("a subclass with its own call", "nnx", partial(NNXOwnCall, 4, 5), (3, 4), OWN),
    refused(
        "an Embed with its own attend",
        "linen",
        partial(LinenOwnAttend, 6, 4),
        (3,),
        ATTEND,
        vocab=6,
    ),
    refused(
        "an Embed with its own attend", "nnx", partial(NNXOwnAttend, 6, 4), (3,), ATTEND, vocab=6
    ),
]

# Other forms of the layers of the table.
VARIANTS: list[Row] = [
    *both(
        "Dense of a vector, without bias",
        linen=partial(linen.Dense, 5, use_bias=False),
        nnx=partial(nnx.Linear, 4, 5, use_bias=False),
        x=(4,),
        params={"kernel": (4, 5)},
        kernels={"kernel": axes("0", "1")},
        layer=by_definition.contraction("i,io->o"),
    ),
    *both(
        "DenseGeneral, axes not in order",
        linen=partial(linen.DenseGeneral, (3,), axis=(-1, 1)),
        nnx=partial(nnx.LinearGeneral, (3, 4), (3,), axis=(-1, 1)),
        x=(2, 3, 5, 4),
        params={"kernel": (3, 4, 3), "bias": (3,)},
        kernels={"kernel": axes("01", "2")},
        layer=by_definition.contraction("bixj,ijo->bxo", (3,)),
    ),
    *both(
        "DenseGeneral, two batch axes, the middle one contracted",
        linen=partial(linen.DenseGeneral, 3, axis=-2, batch_dims=(0, 1)),
        nnx=partial(nnx.LinearGeneral, 4, 3, axis=-2, batch_axis={0: 2, 1: 3}),
        x=(2, 3, 4, 2),
        params={"kernel": (2, 3, 4, 3), "bias": (2, 3, 3)},
        kernels={"kernel": axes("2", "3", "01")},
        layer=by_definition.contraction("bcix,bcio->bcxo", (2, 3, 1, 3)),
    ),
    *einsum("bd,hdk->bhk", (3, 4), (2, 4, 3), axes("1", "02"), (1, 2, 3)),
    *einsum("btd,dnh->btnh", (2, 3, 4), (4, 2, 3), axes("0", "12"), (1, 1, 2, 3)),
    *einsum("btnh,nhd->btd", (2, 3, 2, 3), (2, 3, 4), axes("01", "2"), (1, 1, 4)),
    *einsum("td,edf->tef", (3, 4), (2, 4, 3), axes("1", "02"), (1, 2, 3)),
    *einsum("ted,edf->etf", (3, 2, 4), (2, 4, 3), axes("1", "2", "0"), (2, 1, 3)),
    *einsum("btd,sndh->sbtnh", (2, 3, 4), (3, 2, 4, 2), axes("2", "013"), (3, 1, 1, 2, 2)),
    *einsum("...d,df->...f", (2, 3, 4), (4, 3), axes("0", "1"), (1, 1, 3)),
    *einsum("...d,fd->f...", (2, 3, 4), (3, 4), axes("1", "0"), (3, 1, 1)),
    *einsum("b d, d f -> b f", (3, 4), (4, 3), axes("0", "1")),
    *einsum("btd,df->bf", (2, 3, 4), (4, 3), axes("0", "1"), (1, 3)),
    *einsum("bd,hdk->bk", (3, 4), (2, 4, 3), axes("01", "2"), (1, 3)),
    Row(
        "Einsum, equation in the call",
        "linen",
        partial(linen.Einsum, (2, 4, 3)),
        x=(3, 4),
        params={"kernel": (2, 4, 3), "bias": (2, 3)},
        kernels={"kernel": axes("1", "02")},
        layer=by_definition.contraction("td,edf->tef", (1, 2, 3)),
        call=lambda layer, x: layer(x, "td,edf->tef"),
    ),
    Row(
        "Einsum, another equation in the call",
        "nnx",
        partial(nnx.Einsum, "td,edf->tef", (2, 4, 3), (2, 3)),
        x=(3, 4),
        params={"kernel": (2, 4, 3), "bias": (2, 3)},
        kernels={"kernel": axes("1", "02")},
        layer=by_definition.contraction("td,edf->etf", (2, 1, 3)),
        call=lambda layer, x: layer(x, "td,edf->etf"),
    ),
    *conv((2, 6, 3), (3, 3, 4), padding="CAUSAL", kernel_dilation=2),
    *conv((2, 6, 3), (4, 3, 4), padding="CIRCULAR", strides=2),
    *conv((2, 6, 3), (3, 3, 4), padding="REFLECT", use_bias=False),
    *conv((2, 6, 3), (2, 3, 4), padding=0, input_dilation=2),
    *conv((2, 6, 4), (3, 1, 8), feature_group_count=4),
    *conv((6, 3), (3, 3, 4), padding=1),
    *conv((2, 2, 5, 3), (4, 3, 4)),
    *conv((2, 4, 5, 2), (3, 2, 2, 3), padding=((1, 0), (2, 1)), kernel_dilation=2),
    *conv((2, 2, 3, 3, 3, 2), (2, 2, 3, 2, 3), padding="CIRCULAR"),
    *conv_transpose((2, 5, 3), (3, 3, 4), padding="VALID", kernel_dilation=2, strides=2),
    *conv_transpose((2, 5, 3), (2, 3, 4), padding="VALID", strides=3, use_bias=False),
    *conv_transpose((2, 4, 3), (6, 3, 4), padding="CIRCULAR", strides=2),
    *conv_transpose((2, 4, 3), (5, 4, 3), padding="CIRCULAR", strides=2, transpose_kernel=True),
    *conv_transpose((2, 3, 3, 2), (3, 2, 2, 3), strides=2),
    *conv_transpose((2, 2, 3, 2, 2), (2, 3, 3, 2), padding="VALID", transpose_kernel=True),
    *both(
        "Embed.attend",
        linen=partial(linen.Embed, 6, 4),
        nnx=partial(nnx.Embed, 6, 4),
        x=(2, 3, 4),
        params={"embedding": (6, 4)},
        kernels={"embedding": axes("0", "1")},
        layer=by_definition.attend,
        call=lambda layer, x: layer.attend(x),
    ),
]

# Flax broadcasts a table of one row, whatever the ids. A column of one number has one direction, so
# that the exact gradient of the low rank is zero, of which there is no relative error.
ONE_ROW = both(
    "Embed of one row",
    linen=partial(linen.Embed, 1, 4),
    nnx=partial(nnx.Embed, 1, 4),
    x=(2, 3),
    params={"embedding": (1, 4)},
    kernels={"embedding": axes("0", "1")},
    layer=by_definition.lookup,
    vocab=1,
    rank=1,
)
