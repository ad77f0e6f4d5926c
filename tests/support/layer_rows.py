"""The layer types: how Flax makes each, and what it computes by definition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

import dora_jax as dora
from dora_jax.decomposition import KernelAxes
from dora_jax.layers import einsum_layout
from tests.support import layer_reference as by_definition

partial = functools.partial


def plain_call(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One layer type in one front end.

    Attributes:
      name: of the layer type.
      front_end: "linen" or "nnx".
      make: `(dtype=..., param_dtype=..., ...) -> layer`.
      x: shape of the input.
      params: shapes by dotted name.
      kernels: the axes of each kernel to be adapted, by dotted name.
      layer: what it computes, in NumPy.
      call: `(layer, x) -> y` in Flax.
      vocab: if not 0, the input is of integers below it.
      rank: of the adapters.
      traced: whether `apply_dora` has to trace a call.
      refused: what the `LayoutError` says, if the layer cannot be adapted.
    """

    name: str
    front_end: str
    make: Callable[..., Any]
    x: tuple[int, ...]
    params: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, KernelAxes] = dataclasses.field(default_factory=dict)
    layer: by_definition.Layer | None = None
    call: Callable[[Any, jax.Array], jax.Array] = plain_call
    vocab: int = 0
    rank: int = 2
    traced: bool = False
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.front_end})"


def both(name: str, *, linen: Callable[..., Any], nnx: Callable[..., Any], **common: Any):
    """Returns the rows of a layer that is the same in both front ends."""
    return [Row(name, "linen", linen, **common), Row(name, "nnx", nnx, **common)]


def axes(inputs: str, outputs: str, stack: str = "") -> KernelAxes:
    """Returns kernel axes from digits: `axes("01", "2")`."""
    groups = (tuple(map(int, group)) for group in (stack, inputs, outputs))
    return KernelAxes(*groups)


def unroll(cell: Any, x: jax.Array) -> jax.Array:
    """Runs a recurrent cell, which starts from zeros, over `x (time, batch, in)`."""
    features = getattr(cell, "features", None) or cell.hidden_features
    zeros = jnp.zeros((x.shape[1], features), x.dtype)
    carry, outputs = (zeros, zeros) if "LSTM" in type(cell).__name__ else zeros, []
    for x_t in x:
        carry, y = cell(carry, x_t)
        outputs.append(y)
    return jnp.stack(outputs)


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


def einsum(equation: str, x, kernel, kernel_axes: KernelAxes, bias=None, name: str = ""):
    """Returns the rows of an Einsum layer; `bias` is broadcast against the output."""
    own = None if bias is None else tuple(n for n in bias if n > 1)
    shapes = {"kernel": kernel} | ({} if bias is None else {"bias": own})
    return both(
        name or f"Einsum {equation}",
        linen=partial(linen.Einsum, kernel, equation, use_bias=bias is not None),
        nnx=partial(nnx.Einsum, equation, kernel, own),
        x=x,
        params=shapes,
        kernels={"kernel": kernel_axes},
        layer=by_definition.contraction(equation, bias),
    )


def conv(x, kernel, name: str = "", **fields: Any):
    """Returns the rows of a convolution, of space axes of one stride and one dilation."""
    last = len(kernel) - 1
    definition = by_definition.convolution(
        strides=fields.get("strides", 1),
        padding=_explicit(fields.get("padding", "SAME"), last - 1),
        dilation=fields.get("kernel_dilation", 1),
        input_dilation=fields.get("input_dilation", 1),
        groups=fields.get("feature_group_count", 1),
    )
    return both(
        name or f"Conv {kernel} of {x}, {_text(fields)}",
        linen=partial(linen.Conv, kernel[-1], kernel[:-2], **fields),
        nnx=partial(nnx.Conv, x[-1], kernel[-1], kernel[:-2], **fields),
        x=x,
        params=_with_bias(kernel, kernel[-1], fields),
        kernels={"kernel": KernelAxes((), tuple(range(last)), (last,))},
        layer=definition,
    )


def conv_transpose(x, kernel, name: str = "", **fields: Any):
    """Returns the rows of a transposed convolution, of space axes of one stride and dilation."""
    space, last = len(kernel) - 2, len(kernel) - 1
    transposed = fields.get("transpose_kernel", False)
    inputs, outputs = (last, last - 1) if transposed else (last - 1, last)
    definition = by_definition.transposed_convolution(
        strides=fields.get("strides", 1),
        padding=fields.get("padding", "SAME"),
        dilation=fields.get("kernel_dilation", 1),
        transpose_kernel=transposed,
    )
    per_axis = {k: (v,) * space for k, v in fields.items() if k in ("strides", "kernel_dilation")}
    own = {**fields, **per_axis}
    return both(
        name or f"ConvTranspose {kernel} of {x}, {_text(fields)}",
        linen=partial(linen.ConvTranspose, kernel[outputs], kernel[:space], **own),
        nnx=partial(nnx.ConvTranspose, kernel[inputs], kernel[outputs], kernel[:space], **own),
        x=x,
        params=_with_bias(kernel, kernel[outputs], fields),
        kernels={"kernel": KernelAxes((), (*range(space), inputs), (outputs,))},
        layer=definition,
    )


def _explicit(padding: Any, space: int) -> Any:
    """Returns padding as Flax reads it: one number, or numbers or pairs for each space axis."""
    if isinstance(padding, str):
        return padding
    each = (padding,) * space if isinstance(padding, int) else padding
    return [(p, p) if isinstance(p, int) else p for p in each]


def _with_bias(kernel, features: int, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    bias = {"bias": (features,)} if fields.get("use_bias", True) else {}
    return {"kernel": kernel, **bias}


def _text(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in fields.items())


def recurrent(
    name: str, front_end: str, make: Callable[..., Any], dense: dict[str, Any], adapted, layer
):
    """Returns the row of a cell; `dense` has `(in, out)` of each layer, or `(in, out, True)`."""
    params: dict[str, tuple[int, ...]] = {}
    for key, (inputs, outputs, *bias) in dense.items():
        params[f"{key}.kernel"] = (inputs, outputs)
        if bias:
            params[f"{key}.bias"] = (outputs,)
    # Flax's default starts orthogonal, for which newer releases of JAX accept no bfloat16.
    make = partial(make, recurrent_kernel_init=jax.nn.initializers.lecun_normal())
    return Row(
        name,
        front_end,
        make,
        x=(2, 3, 4),
        params=params,
        kernels={f"{key}.kernel": axes("0", "1") for key in adapted},
        layer=layer,
        call=unroll,
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


class LinenOwnCall(linen.Dense):
    @linen.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


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
