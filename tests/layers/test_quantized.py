"""A quantised layer computes what one with the dequantised kernel does, adapted or not."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.decomposition import QuantizedKernel, dense
from dora_jax.layers.quantized_box import QuantizedBox
from tests.support.layers.errors import config
from tests.support.layers.laws import close, numbers
from tests.support.layers.models import model
from tests.support.layers.rows import Row
from tests.support.layers.table import SINGLE
from tests.support.models import same
from tests.support.quick import quick_jit

FORMATS = [
    dora.Quantization("nf4", block=2, double=True),
    dora.Quantization("int8"),
    dora.Quantization("int4", block=2),
    dora.Quantization("fp8"),
]
# Every layer of one kernel, in the formats in turn, in a stack where that can be.
CASES = [
    (row, FORMATS[i // 2 % 4], "scan" if i // 2 % 4 == 1 else "plain")
    for i, row in enumerate(SINGLE)
]
DEFAULT = ("Dense / Linear (linen)", "Embed (nnx)")


def is_quantized(x):
    return isinstance(x, QuantizedBox | QuantizedKernel)


def dequantised(params: Any) -> Any:
    def one(x: Any) -> Any:
        return dense(x.value if isinstance(x, QuantizedBox) else x) if is_quantized(x) else x

    return jax.tree.map(one, params, is_leaf=is_quantized)


def parts(row: Row, quantization: Any, transforms: Sequence[str]) -> Any:
    """Returns a row's model, quantised parameters, the dequantised ones, adapters and inputs."""
    params, adapters, xs = numbers(row, jnp.float32, transforms)
    layers = model(row, jnp.float32, jnp.float32, transforms)
    quantized = layers.quantize(quantization, params, xs)
    assert any(map(is_quantized, jax.tree.leaves(quantized, is_leaf=is_quantized)))
    return layers, quantized, dequantised(quantized), adapters, xs


def loss(adapted, xs, adapters):
    return sum(jnp.mean(jnp.sin(y)) for y in jax.tree.leaves(adapted.apply(adapters, xs)))


@pytest.mark.parametrize(
    ("row", "quantization", "transform"),
    [
        pytest.param(*case, marks=() if str(case[0]) in DEFAULT else pytest.mark.full)
        for case in CASES
    ],
    ids=str,
)
def test_a_quantised_layer_is_the_dequantised_one(row, quantization, transform):
    layers, quantized, whole, adapters, xs = parts(row, quantization, (transform,))
    ours, plain = (layers.adapt(config(row), params, xs) for params in (quantized, whole))
    start = jax.jit(ours.apply)(ours.adapters, xs)
    base = jax.jit(functools.partial(layers.base, quantized))(xs)
    # XLA compiles small products in two scans differently, of unquantised layers too.
    assert same(start, base) if transform == "plain" else close(start, base, 1e-6)
    found, expected = (
        quick_jit(jax.value_and_grad(functools.partial(loss, adapted, xs)))(adapters)
        for adapted in (ours, plain)
    )
    assert close(found, expected, 1e-6)
    assert close(ours.merge(adapters), plain.merge(adapters), 1e-6)


# Which base an adapter is merged into.


def trained(seed=0):
    """Returns a plain layer, and one that is quantised, adapted and changed."""
    plain = nnx.Linear(96, 8, rngs=nnx.Rngs(seed))
    model = dora.quantize(plain, "nf4")
    model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
    lora_b = 0.1 * jax.random.normal(jax.random.key(2), model.lora_b.shape)
    model.lora_b.set_value(lora_b.at[:, 0].set(0))  # a column that is not turned
    model.magnitude.set_value(1.1 * model.magnitude[...])
    return plain, model


def by_numpy(kernel, model):
    """`m V / ||V||` of a kernel, in float64."""
    a, b, m = (
        np.asarray(x[...], np.float64) for x in (model.lora_a, model.lora_b, model.magnitude)
    )
    v = np.asarray(kernel, np.float64) + model.adapted.settings.scaling * a @ b
    return m * v / np.linalg.norm(v, axis=0)


def share(text):
    return float(re.search(r"by ([\d.]+)% of the change", text)[1]) / 100


def test_merging_says_into_which_base_and_what_it_loses():
    plain, model = trained()
    whole, original = model.kernel[...], plain.kernel[...]
    expected, other = by_numpy(whole, model), by_numpy(original, model)
    np.testing.assert_allclose(dora.merge(model).kernel[...], expected, atol=1e-6)
    with pytest.warns(UserWarning, match="merging into the original kernels") as warned:
        merged = dora.merge(model, into=plain)
    np.testing.assert_allclose(merged.kernel[...], other, atol=1e-6)
    change = np.linalg.norm(expected - whole)
    lost = np.linalg.norm(other - expected) / change
    assert abs(share(str(warned[0].message)) - lost) <= 6e-4
    with pytest.warns(UserWarning, match="merging requantises the kernels") as warned:
        again = dora.merge(model, into="requantized")
    assert again.kernel.get_value().format == "nf4"
    lost = np.linalg.norm(again.kernel[...] - expected) / change
    assert abs(share(str(warned[0].message)) - lost) <= 6e-4


def test_what_is_not_a_base_to_merge_into_is_refused():
    _, model = trained()
    for into in ("bf16", nnx.Linear(95, 8, rngs=nnx.Rngs(0)), dora.quantize(trained()[0], "nf4")):
        with pytest.raises(dora.errors.AdapterError, match=r"into=|the original"):
            dora.merge(model, into=into)


def test_quantising_after_adapting_is_refused_and_so_is_training_codes():
    plain, model = trained()
    with pytest.raises(dora.errors.AdapterError, match="quantise first, then apply_dora"):
        dora.quantize(model, "nf4")
    layers = nnx.Dict(up=plain, head=nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=2, target_modules=["up"], modules_to_save=["head"])
    with pytest.raises(dora.errors.AdapterError, match=r"^head is in modules_to_save.*exclude"):
        dora.apply_dora(dora.quantize(layers, "int8"), config, rngs=nnx.Rngs(0))
    left = dora.quantize(layers, "int8", exclude_modules=["head"])
    assert not isinstance(left.head.kernel.get_value(), QuantizedKernel)
    dora.apply_dora(left, config, rngs=nnx.Rngs(0))
    with pytest.raises(dora.errors.AdapterError, match="quantised already"):
        dora.quantize(left, "nf4", target_modules=["up"])


@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_all_linear_are_the_layers_that_apply_dora_adapts(front_end):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids):
            return linen.Dense(8, name="up")(linen.Embed(64, 64, name="embed")(ids))

    ids = jnp.zeros((2, 3), int)
    if front_end == "nnx":
        model = nnx.Dict(
            embed=nnx.Embed(64, 64, rngs=nnx.Rngs(0)), up=nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        )
        found = dora.quantize(model, "nf4", target_modules="all-linear")
        kernels = [found.embed.embedding.get_value(), found.up.kernel.get_value()]
    else:
        params = Model().init(jax.random.key(0), ids)["params"]
        found = dora.quantize(
            Model(), "nf4", params=params, inputs=(ids,), target_modules="all-linear"
        )
        kernels = [found["embed"]["embedding"], found["up"]["kernel"]]
    assert isinstance(kernels[0], jax.Array)
    assert not isinstance(kernels[1], jax.Array)


@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_a_start_from_the_error_is_the_nearest_of_its_rank(front_end):
    kernel = jax.random.normal(jax.random.key(0), (96, 8))
    config, x = dora.DoRAConfig(rank=3), jax.random.normal(jax.random.key(1), (4, 96))
    if front_end == "nnx":
        plain = nnx.Linear(96, 8, use_bias=False, rngs=nnx.Rngs(0))
        plain.kernel.set_value(kernel)
        base = dora.quantize(plain, "nf4")
        model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
        model, distances = dora.start_from_error(model, plain)
        found, whole = model(x), base.kernel[...]
    else:
        module, plain = linen.Dense(8, use_bias=False), {"kernel": kernel}
        base = dora.quantize(module, "nf4", params=plain, inputs=(x,))
        model, adapters = dora.apply_dora(
            module, config, params=base, rng=jax.random.key(0), inputs=(x,)
        )
        adapters, distances = dora.start_from_error(model, plain, params=base, adapters=adapters)
        found = model.apply({"params": base, "dora": adapters}, x)
        whole = dense(base["kernel"].value)
    w, w0 = np.asarray(kernel, np.float64), np.asarray(whole, np.float64)
    u, s, vt = np.linalg.svd(w - w0, full_matrices=False)
    start = w0 + (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ start, atol=2e-5)
    (own,) = distances.values()
    length = np.linalg.norm(w)
    np.testing.assert_allclose(own.quantized, np.linalg.norm(w0 - w) / length, rtol=1e-5)
    np.testing.assert_allclose(own.start, np.linalg.norm(s[3:]) / length, rtol=1e-4)


@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_the_low_rank_part_takes_the_largest_singular_directions(front_end):
    """QPiSSA: `Q(W - W_r)` is the base, and the start at least as near to W as with `W_r`."""
    rng, rank = np.random.default_rng(0), 3
    u, v = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (96, 8))
    spectrum = np.array([9, 5, 3, 1, 0.9, 0.8, 0.7, 0.6])
    w = ((u * spectrum) @ v.T).astype(np.float32)
    principal = (u[:, :rank] * spectrum[:rank]) @ v[:, :rank].T
    config, x = dora.DoRAConfig(rank=rank), jnp.ones((1, 96))
    if front_end == "nnx":
        plain = nnx.Linear(96, 8, use_bias=False, rngs=nnx.Rngs(0))
        plain.kernel.set_value(jnp.asarray(w))
        base = dora.quantize(plain, "nf4", principal_rank=rank)
        model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
        model, distances = dora.start_from_error(model, plain)
        found, w0 = model(x), dense(base.kernel.get_value())
        shapes = nnx.eval_shape(lambda: nnx.Linear(96, 8, rngs=nnx.Rngs(0)))
        with pytest.raises(dora.errors.AdapterError, match="principal_rank needs the kernel"):
            dora.quantize(shapes, "nf4", principal_rank=rank)
    else:
        module, plain = linen.Dense(8, use_bias=False), {"kernel": jnp.asarray(w)}
        base = dora.quantize(module, "nf4", params=plain, inputs=(x,), principal_rank=rank)
        model, adapters = dora.apply_dora(
            module, config, params=base, rng=jax.random.key(0), inputs=(x,)
        )
        adapters, distances = dora.start_from_error(model, plain, params=base, adapters=adapters)
        found, w0 = model.apply({"params": base, "dora": adapters}, x), dense(base["kernel"].value)
    rest, w0 = w - principal, np.asarray(w0, np.float64)
    rounding = np.linalg.norm(w0 - rest)
    assert rounding <= 0.15 * np.linalg.norm(rest)  # nf4 of the rest, and not of the kernel
    left, s, right = np.linalg.svd(w - w0, full_matrices=False)
    start = w0 + (left[:, :rank] * s[:rank]) @ right[:rank]
    np.testing.assert_allclose(found, np.ones((1, 96)) @ start, atol=2e-5)
    (own,) = distances.values()
    np.testing.assert_allclose(own.start, np.linalg.norm(s[rank:]) / np.linalg.norm(w), rtol=1e-4)
    assert own.start <= rounding / np.linalg.norm(w) < 0.1 * own.quantized
