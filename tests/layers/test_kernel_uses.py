"""Models that compute a kernel, share it, read it elsewhere, or multiply in a way of their own."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from tests.support import reference
from tests.support.models import inputs, linen_variables, nnx_model, random_adapters
from tests.support.quick import quick_jit

X = inputs(3, 4)
IDS = jnp.array([[1, 2, 3]])


def triple(a, b, dimension_numbers, **_):
    """A product of a user's own, linear in the kernel."""
    return 3 * jax.lax.dot_general(a, b, dimension_numbers)


def triple_einsum(equation, a, b, **_):
    return 3 * jnp.einsum(equation, a, b)


class Model(nn.Module):
    """A Linen model of one function of the module and its input."""

    run: Any

    @nn.compact
    def __call__(self, x):
        return self.run(self, x)


def adapt(run, x=X, rank=2, **fields):
    module = Model(run)
    variables = linen_variables(module, x)
    params = variables.pop("params")
    config = dora.DoRAConfig(rank=rank, **fields)
    model, adapters = dora.apply_dora(
        module,
        config,
        params=params,
        rng=jax.random.key(2),
        inputs=dora.linen.ExampleCall((x,), variables=variables),
    )
    return module, params, model, adapters


def mapped(module, function, dense=None):
    lifted = nn.map_variables(
        dense or nn.Dense,
        "params",
        trans_in_fn=lambda tree: jax.tree.map(function, tree),
        init=module.is_initializing(),
        mutable=True,
    )
    return lifted(5, name="layer")


class ScannedNorm(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.WeightNorm(nn.Dense(4, name="layer"))(carry), None


def scanned(module, x):
    del module
    stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
    return nn.scan(ScannedNorm, **stack)(name="stack")(x, None)[0]


COMPUTED = {
    "WeightNorm": lambda m, x: nn.WeightNorm(nn.Dense(5, name="layer"))(x),
    "SpectralNorm": lambda m, x: nn.SpectralNorm(nn.Dense(5, name="layer"))(x, update_stats=True),
    "map_variables": lambda m, x: mapped(m, lambda leaf: 2 * leaf)(x),
    "WeightNorm in a scan": scanned,
    "in remat": lambda m, x: nn.remat(nn.WeightNorm)(nn.Dense(5, name="layer"))(x),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_kernel_that_the_model_computes_is_refused(name):
    with pytest.raises(
        dora.errors.LayoutError, match=r"layer cannot be adapted: the model computes its"
    ):
        adapt(COMPUTED[name])


def _branches(module, x):
    one, other = nn.Dense(5, name="one"), nn.Dense(5, name="other")
    if module.is_initializing():
        return one(x) + other(x)
    return nn.cond(jnp.sum(x) > 0, lambda m, x: one(x), lambda m, x: other(x), module, x)


def _loop(module, x):
    dense = nn.Dense(4, name="dense")
    if module.is_initializing():
        return dense(x)
    return nn.while_loop(
        lambda m, c: c[0] < 3,
        lambda m, c: (c[0] + 1, dense(c[1])),
        module,
        (0, x),
        broadcast_variables="params",
    )[1]


def _pull_back(module, x):
    dense = nn.Dense(4, name="dense")
    if module.is_initializing():
        return dense(x)
    y, pull_back = nn.vjp(lambda m, x: dense(x), module, x)
    return y + pull_back(jnp.ones_like(y))[1]


STORED = {
    "cond": _branches,
    "while_loop": _loop,
    "vjp": _pull_back,
    "jit": lambda m, x: nn.jit(nn.Dense)(5, name="dense")(x),
    "dot_general": lambda m, x: nn.Dense(5, dot_general=triple)(x),
    "dot_general of DenseGeneral": lambda m, x: nn.DenseGeneral((5, 2), dot_general=triple)(x),
    "normalised queries": lambda m, x: nn.MultiHeadDotProductAttention(
        2, qkv_features=32, normalize_qk=True
    )(x[None]),
}


@pytest.mark.rows(2)
@pytest.mark.parametrize("name", STORED)
def test_a_kernel_that_is_stored_is_adapted_and_merged(name):
    module, params, model, adapters = adapt(STORED[name])
    x = inputs(64, 4)  # XLA for CPU rounds the products of a loop below 1 kB in another way

    @quick_jit
    def apply(params, adapters):
        return model.apply({"params": params, "dora": adapters}, x)

    base = quick_jit(lambda params: module.apply({"params": params}, x))
    # XLA for CPU rounds a `3 h + bias` once. An adapted layer has its scale between the two.
    bound = 5e-7 if name.startswith("dot_general") else 0.0
    assert reference.relative_error(apply(params, adapters), base(params)) <= bound
    trained = random_adapters(adapters)
    merged = base(dora.merge(model, params, trained))
    assert reference.relative_error(apply(params, trained), merged) <= 5e-6
    assert reference.relative_error(merged, base(params)) > 1e-2


def test_a_product_with_a_state_of_its_own_is_refused():
    with pytest.raises(
        dora.errors.LayoutError, match=r"layer cannot be adapted: the dot_general_cls"
    ):
        adapt(lambda m, x: nn.Dense(5, name="layer", dot_general_cls=nn.Fp8DotGeneralOp)(x))


def _tied(head):
    def run(module, ids):
        del module
        embed = nn.Embed(6, 4, name="embed")
        return head(embed, nn.Dense(4, name="dense")(embed(ids)))

    return run


HEADS = {
    "read": lambda embed, h: h @ embed.embedding.T,
    "borrowed": lambda embed, h: nn.Dense(6, use_bias=False, parent=None).apply(
        {"params": {"kernel": embed.embedding.T}}, h
    ),
    "in a checkpoint": lambda embed, h: jax.checkpoint(jnp.matmul)(h, embed.embedding.T),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_table_that_a_head_reads_is_refused(head):
    with pytest.raises(
        dora.errors.LayoutError, match="embed cannot be adapted: a tied head reads its"
    ):
        adapt(_tied(HEADS[head]), IDS, target_modules=["embed", "dense"])
    adapt(_tied(HEADS[head]), IDS, target_modules=["dense"])


def test_a_table_that_a_head_attends_to_is_adapted():
    _, _, _, adapters = adapt(_tied(nn.Embed.attend), IDS, target_modules=["embed"])
    assert list(adapters) == ["embed"]


class Transposing(nn.Dense):
    """Its product is `nn.Dense`'s, and it has another one."""

    def back(self, y):
        return y @ self.variables["params"]["kernel"].T


def own_kernel(layer):
    return layer.variables["params"]["kernel"]


class ScannedRead(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        layer = nn.Dense(4, name="layer")
        return layer(carry) @ own_kernel(layer).T, None


def _read(make, use):
    """A model that runs a layer, and then uses its kernel."""

    def run(module, x):
        del module
        layer = make(name="layer")
        return use(layer(x), layer)

    return run


READS = {
    "Dense": _read(functools.partial(nn.Dense, 5), lambda y, layer: y @ own_kernel(layer).T),
    "Dense, by jit": _read(
        functools.partial(nn.Dense, 5), lambda y, layer: y @ jnp.swapaxes(own_kernel(layer), 0, 1)
    ),
    "a method": _read(functools.partial(Transposing, 5), lambda y, layer: layer.back(y)),
    "returned": _read(functools.partial(nn.Dense, 5), lambda y, layer: (y, own_kernel(layer))),
    "returned by jit": _read(
        functools.partial(nn.Dense, 5), lambda y, layer: (y, jax.jit(jnp.copy)(own_kernel(layer)))
    ),
    "a slice": _read(
        functools.partial(nn.Dense, 5), lambda y, layer: y[:, :2] @ own_kernel(layer)[:, :2].T
    ),
    "a penalty": _read(
        functools.partial(nn.DenseGeneral, (5, 2)), lambda y, layer: (own_kernel(layer) ** 2).sum()
    ),
    "Einsum": _read(
        functools.partial(nn.Einsum, (4, 5), "bi,io->bo"), lambda y, layer: own_kernel(layer) @ y.T
    ),
    "Conv": _read(
        functools.partial(nn.Conv, 5, (2,)), lambda y, layer: y + own_kernel(layer)[0, 0]
    ),
    "a scan": lambda m, x: nn.scan(
        ScannedRead, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )(name="stack")(x, None)[0],
}


@pytest.mark.parametrize("name", READS)
def test_a_kernel_that_is_read_outside_its_layer_is_refused(name):
    module = Model(READS[name])
    params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    config = dora.DoRAConfig(rank=2, target_modules=["layer"])
    with pytest.raises(
        dora.errors.LayoutError, match=r"layer cannot be adapted: .* outside of the layer too"
    ):
        dora.apply_dora(module, config, params=params, rng=jax.random.key(1), inputs=(X,))


def _two_ways(module, x, way="both"):
    one, other = nn.Dense(4, name="one"), nn.Dense(5, name="other")
    return {"both": lambda: other(one(x)), "one": lambda: one(x)}[way]()


class TwoWays(nn.Module):
    run: Any = _two_ways

    @nn.compact
    def __call__(self, x, way="both"):
        return self.run(self, x, way)


def test_layers_that_the_traced_call_does_not_reach_are_named():
    module = TwoWays()
    params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]

    def adapt(inputs, **fields):
        config = dora.DoRAConfig(rank=2, **fields)
        return dora.apply_dora(module, config, params=params, rng=jax.random.key(1), inputs=inputs)[
            1
        ]

    with pytest.warns(UserWarning, match="the traced call does not reach other, so .*inputs="):
        assert list(adapt((X, "one"))) == ["one"]
    for field in ("target_modules", "modules_to_save"):
        with pytest.raises(
            dora.errors.ConfigError, match=rf"{field} entry 'other' names other, which .* inputs="
        ):
            adapt((X, "one"), **{field: ["other"]})
    with warnings.catch_warnings(action="error"):
        assert list(adapt((X,))) == ["one", "other"]
        assert list(adapt((X, "one"), exclude_modules=["other"])) == ["one"]


class Optional(nn.Module):
    """A call with arguments that are no arrays."""

    @nn.compact
    def __call__(self, x, mask=None, train=False, act="relu", *, steps=1):
        for _ in range(steps):
            x = nn.Dense(4)(x if mask is None else x * mask)
        return {"relu": nn.relu, "tanh": nn.tanh}[act](x) if train else x


class NNXOptional(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, mask=None, train=False, act="relu"):
        x = self.dense(x if mask is None else x * mask)
        return {"relu": nnx.relu, "tanh": nnx.tanh}[act](x) if train else x


MASK = jax.ShapeDtypeStruct((3, 1), jnp.float32)


@pytest.mark.parametrize(
    "inputs", [(X, None, True), (X, MASK, False, "tanh"), [X, np.ones((3, 1)), True, "tanh"]]
)
def test_arguments_that_are_no_arrays_are_static(inputs):
    params = jax.eval_shape(Optional().init, jax.random.key(0), X)["params"]
    call = dora.linen.ExampleCall((X,), {"mask": MASK, "train": True, "steps": 1, "act": "relu"})
    key, config = jax.random.key(1), dora.DoRAConfig(rank=2)
    for example in (inputs, call):
        adapted, _ = dora.apply_dora(Optional(), config, params=params, rng=key, inputs=example)
        assert list(adapted.layers) == [("Dense_0",)]
    model = nnx.eval_shape(lambda: NNXOptional(nnx.Rngs(0)))
    adapted = dora.apply_dora(model, config, rngs=nnx.Rngs(1), inputs=inputs)
    assert list(dora.nnx.adapted_layers(adapted)) == [("dense",)]


class NNXModel(nnx.Module):
    def __init__(self, **members):
        for name, member in members.items():
            setattr(self, name, member)

    def __call__(self, x):
        return self.layer(x)


def linear(**fields):
    return nnx.Linear(4, 5, rngs=nnx.Rngs(0), **fields)


def _shared():
    model = NNXModel(layer=linear(), other=linear())
    model.other.kernel = model.layer.kernel
    return model


def _held():
    model = NNXModel(layer=linear())
    model.held = model.layer.kernel
    return model


def _stacked_behind():
    out_axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    make = nnx.vmap(lambda rngs: nnx.Linear(4, 5, rngs=rngs), out_axes=out_axes)
    return NNXModel(layer=nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))


NNX_REFUSED = {
    r"layer.layer_instance .*WeightNorm overwrites": lambda: NNXModel(
        layer=nnx.WeightNorm(linear(), rngs=nnx.Rngs(0))
    ),
    r"layer.layer_instance .*SpectralNorm overwrites": lambda: NNXModel(
        layer=nnx.SpectralNorm(linear(), rngs=nnx.Rngs(0))
    ),
    r"layer cannot be adapted: its kernel is other.kernel too": _shared,
    r"layer cannot be adapted: its kernel is held too": _held,
    r"layer: the kernel is stored as \(4, 3, 5\)": _stacked_behind,
    r"layer .*the dot_general_cls": lambda: NNXModel(
        layer=nnx.LinearGeneral(4, 5, rngs=nnx.Rngs(0), dot_general_cls=lambda: triple)
    ),
}


@pytest.mark.parametrize("message", NNX_REFUSED)
def test_an_nnx_kernel_that_is_not_the_layers_alone_is_refused(message):
    with pytest.raises(dora.errors.LayoutError, match=message):
        dora.apply_dora(NNX_REFUSED[message](), dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))


NNX_PRODUCTS = {
    "Linear": functools.partial(nnx.Linear, 4, 5, dot_general=triple),
    "LinearGeneral": functools.partial(nnx.LinearGeneral, 4, (5, 2), dot_general=triple),
    "Einsum": functools.partial(nnx.Einsum, "bi,io->bo", (4, 5), einsum_op=triple_einsum),
}


@pytest.mark.rows(1)
@pytest.mark.parametrize("name", NNX_PRODUCTS)
def test_an_nnx_layer_with_a_product_of_its_own_is_adapted_and_merged(name):
    base = nnx_model(lambda rngs: NNXModel(layer=NNX_PRODUCTS[name](rngs=rngs)))
    model = dora.apply_dora(base, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    run = nnx.jit(lambda model, x: model(x))
    y = run(model, X)
    assert reference.relative_error(y, run(dora.merge(model), X)) <= 5e-6
    assert reference.relative_error(y, run(base, X)) > 1e-2


class NNXTied(nnx.Module):
    def __init__(self, head, rngs):
        self.head = head
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.embed, self.dense(self.embed(ids)))


def test_an_nnx_table_that_a_head_reads_is_refused_where_a_call_is_traced():
    def adapt(head, *names):
        config = dora.DoRAConfig(rank=2, target_modules=names)
        model = NNXTied(head, nnx.Rngs(0))
        return dora.apply_dora(model, config, rngs=nnx.Rngs(1), inputs=(IDS,))

    def read(embed, h):
        return h @ embed.embedding[...].T

    with pytest.raises(
        dora.errors.LayoutError, match="embed cannot be adapted: a tied head reads its"
    ):
        adapt(read, "embed", "dense")
    adapt(read, "dense")
    adapt(lambda embed, h: embed.attend(h), "embed", "dense")


class NNXReads(nnx.Module):
    def __init__(self, layer, read):
        self.layer, self.read = layer, read

    def __call__(self, x):
        return self.read(self.layer(x), self.layer)


class NNXTransposing(nnx.Linear):
    def back(self, y):
        return y @ self.kernel[...].T


@nnx.split_rngs(splits=2)
@nnx.vmap
def linear_stack(rngs):
    return nnx.Linear(4, 4, rngs=rngs)


class NNXScannedRead(nnx.Module):
    def __init__(self, rngs):
        self.layer = linear_stack(rngs)

    def __call__(self, x):
        def body(x, layer):
            return layer(x) @ layer.kernel[...].T

        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layer)


NNX_READS = {
    "Linear": lambda rngs: NNXReads(
        nnx.Linear(4, 5, rngs=rngs), lambda y, layer: y @ layer.kernel[...].T
    ),
    "get_value": lambda rngs: NNXReads(
        nnx.Linear(4, 5, rngs=rngs), lambda y, layer: y @ layer.kernel.get_value()[:2].T
    ),
    "a method": lambda rngs: NNXReads(
        NNXTransposing(4, 5, rngs=rngs), lambda y, layer: layer.back(y)
    ),
    "returned": lambda rngs: NNXReads(
        nnx.Linear(4, 5, rngs=rngs), lambda y, layer: (y, layer.kernel[...])
    ),
    "LinearGeneral": lambda rngs: NNXReads(
        nnx.LinearGeneral(4, (5, 2), rngs=rngs), lambda y, layer: jnp.sum(layer.kernel[...] ** 2)
    ),
    "Conv": lambda rngs: NNXReads(
        nnx.Conv(4, 5, (2,), rngs=rngs), lambda y, layer: y + layer.kernel[...][0, 0]
    ),
    "nothing": lambda rngs: nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.relu),
    "a scan": NNXScannedRead,
}


@pytest.mark.parametrize("name", NNX_READS)
def test_an_nnx_kernel_that_is_read_outside_its_layer_is_refused_where_a_call_is_traced(name):
    model = nnx.eval_shape(lambda: NNX_READS[name](nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=2, target_modules=r"layer|layers\.0")

    def adapt(inputs):
        return dora.apply_dora(model, config, rngs=nnx.Rngs(1), inputs=inputs)

    if name == "nothing":  # nothing but Flax's own code runs
        with warnings.catch_warnings(action="error"):
            adapt(None)
            adapt((X,))
        return
    with pytest.raises(
        dora.errors.LayoutError, match=r"layer cannot be adapted: .* outside of the layer too"
    ):
        adapt((X,))
    with pytest.warns(UserWarning, match=r"could not check .* nothing else reads .*: layer. Pass"):
        adapt(None)


def test_an_nnx_layer_that_the_traced_call_does_not_call_is_named():
    model = nnx.eval_shape(lambda: NNXModel(layer=linear(), other=linear()))
    with pytest.warns(UserWarning, match="other: the traced call does not call this layer"):
        dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1), inputs=(X,))
