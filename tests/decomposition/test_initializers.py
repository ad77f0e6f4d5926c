"""Initial values of adapters: the model equals its base, and the factors are as published."""

from __future__ import annotations

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.config import Init
from dora_jax.decomposition import KernelAxes, init_layer
from tests.support import reference
from tests.support.models import FRONT_ENDS, NNXChain, inputs, nnx_model, random_adapters, same
from tests.support.operations import CHAIN, LAYERS, WIDTH, chain, parameters, stack
from tests.support.quick import quick_jit
from tests.support.selection import table

INITS = get_args(Init)
FROM_KERNEL = ("pissa", "olora")  # the factors start from the kernel, not with a product of zero
RANK = 4

# The axes of kernels and their shapes.
KERNELS = {
    "dense": (KernelAxes((), (0,), (1,)), (24, 40)),
    "wide": (KernelAxes((), (0,), (1,)), (40, 24)),
    "stack": (KernelAxes((0,), (1,), (2,)), (3, 24, 40)),
    "two in axes": (KernelAxes((), (0, 1), (2,)), (3, 8, 20)),
    "two out axes behind a stack of two axes": (KernelAxes((0, 1), (2,), (3, 4)), (2, 2, 12, 3, 4)),
    "transposed": (KernelAxes((), (1,), (0,)), (24, 40)),
}


def start(init, kernel_name="dense", *, key=0, path=("layer",), dtype=jnp.float32, **fields):
    """Returns `adapter, base, kernel` of a layer alone."""
    axes, shape = KERNELS[kernel_name]
    config = dora.DoRAConfig(**{"rank": RANK, "init": init, **fields})
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    spec = config.layer_settings(path)
    return *init_layer(config, spec, path, jax.random.key(key), kernel, axes), kernel


@functools.cache
def model_with(front_end, init, build=chain, **dtypes):
    return build(front_end, dora.DoRAConfig(rank=RANK, init=init), **dtypes)


# At the start the adapted model equals its base.


@pytest.mark.rows(5)
@pytest.mark.parametrize(
    ("front_end", "init", "dtype"),
    table(
        FRONT_ENDS,
        INITS,
        [jnp.float32, jnp.bfloat16],
        default=lambda front_end, _, dtype: front_end == "linen" or dtype == jnp.float32,
    ),
)
@pytest.mark.filterwarnings("error")  # merging has nothing to round away
def test_every_start_is_an_identity(front_end, init, dtype):
    """To the last bit where `lora_b` is zero; to rounding where two products cancel."""
    model = model_with(front_end, init, param_dtype=dtype)
    x = inputs(7, CHAIN[0], dtype)
    base = jax.jit(model.base)(model.params, x)
    y = jax.jit(model.apply)(model.params, model.adapters, x)
    merged = model.merge(model.params, model.adapters)
    assert y.dtype == base.dtype == dtype
    if init not in FROM_KERNEL:
        assert same(y, base)
        assert same(merged, model.params)
    else:
        assert reference.relative_error(y, base) <= (2e-6 if dtype == jnp.float32 else 4e-3)
        for name, layer in merged.items():
            kernel = model.params[name]["kernel"]
            assert reference.relative_error(layer["kernel"], kernel) <= 2e-6


@pytest.mark.rows(2)
@pytest.mark.parametrize(
    ("front_end", "init"), [("linen", "pissa"), ("nnx", "olora"), ("nnx", "orthogonal")]
)
def test_every_start_of_a_stack_equals_the_base(front_end, init):
    model, x = model_with(front_end, init, stack), inputs(7, WIDTH)
    base = jax.jit(model.base)(model.params, x)
    y = jax.jit(model.apply)(model.params, model.adapters, x)
    assert reference.relative_error(y, base) <= (2e-6 if init in FROM_KERNEL else 0)


@pytest.mark.parametrize("init", INITS)
def test_the_frozen_kernel_stays_the_pretrained_one(init):
    """PiSSA and OLoRA as published take the product off the kernel; its checkpoint then is lost."""
    model = nnx_model(lambda rngs: NNXChain(CHAIN, rngs=rngs))
    before = jax.tree.map(jnp.copy, parameters(model))
    adapted = dora.apply_dora(model, dora.DoRAConfig(rank=RANK, init=init), rngs=nnx.Rngs(1))
    assert same(parameters(adapted), before)
    assert same(parameters(model), before)


@pytest.mark.rows(6)
@pytest.mark.parametrize("init", FROM_KERNEL)
@pytest.mark.parametrize("name", KERNELS)
def test_the_magnitude_starts_at_the_norm(name, init):
    adapter, base, kernel = start(init, name)
    expected = reference.norm(reference.as_stack_of_matrices(np.asarray(kernel), KERNELS[name][0]))
    assert same(adapter["magnitude"], base.norm)
    assert reference.relative_error(base.norm.reshape(expected.shape), expected) < 1e-6


@pytest.mark.rows(1)
@pytest.mark.parametrize(
    ("front_end", "adapter_dtype"),
    [("linen", "bfloat16"), ("linen", "float16"), ("nnx", "bfloat16")],
)
def test_adapters_of_a_narrow_dtype_equal_the_base_at_the_start(front_end, adapter_dtype):
    """A magnitude in bfloat16 is the norm rounded by up to 4e-3; the model must not see that."""
    config = dora.DoRAConfig(rank=RANK, adapter_dtype=adapter_dtype)
    model, x = chain(front_end, config), inputs(7, CHAIN[0])
    apply = jax.jit(model.apply)
    assert same(apply(model.params, model.adapters, x), jax.jit(model.base)(model.params, x))
    trained = random_adapters(model.adapters)
    wide = dora.adapters.cast_adapters(trained, jnp.float32)
    assert (
        reference.relative_error(apply(model.params, trained, x), apply(model.params, wide, x))
        <= 1e-6
    )


# The factors are as published.


def as_matrices(kernel_name, adapter, kernel):
    """Returns A, B and W0 as stacks of matrices, in float64."""
    axes, _ = KERNELS[kernel_name]
    w = reference.as_stack_of_matrices(np.asarray(kernel, np.float64), axes)
    layers, fan_in, fan_out = w.shape
    a = np.asarray(adapter["lora_a"], np.float64).reshape(layers, fan_in, RANK)
    b = np.asarray(adapter["lora_b"], np.float64).reshape(layers, RANK, fan_out)
    return a, b, w


def truncated_svd(w):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


def truncated_qr(w):
    q, r = np.linalg.qr(w)
    return q[:, :RANK] @ r[:RANK]


@pytest.mark.rows(8)
@pytest.mark.parametrize("alpha", [16.0, 1.0])
@pytest.mark.parametrize(("init", "product"), [("pissa", truncated_svd), ("olora", truncated_qr)])
@pytest.mark.parametrize("name", KERNELS)
def test_the_scaled_product_is_the_truncated_decomposition(name, init, product, alpha):
    adapter, base, kernel = start(init, name, alpha=alpha)
    a, b, w = as_matrices(name, adapter, kernel)
    for i in range(len(w)):
        expected = product(w[i])
        assert reference.relative_error(alpha / RANK * a[i] @ b[i], expected) <= 1e-5
        assert np.linalg.norm(w[i] - expected) < np.linalg.norm(w[i])
    assert same(base.init_a, adapter["lora_a"])
    assert same(base.init_b, adapter["lora_b"])


def test_pissa_is_the_best_approximation_and_divides_the_singular_values_evenly():
    adapter, _, kernel = start("pissa", alpha=float(RANK))
    a, b, w = as_matrices("dense", adapter, kernel)
    values = np.linalg.svd(w[0], compute_uv=False)
    error = np.linalg.norm(w[0] - a[0] @ b[0])
    assert np.isclose(error, np.linalg.norm(values[RANK:]), rtol=1e-5)
    np.testing.assert_allclose(np.square(a[0]).sum(0), values[:RANK], rtol=1e-5)
    np.testing.assert_allclose(np.square(b[0]).sum(1), values[:RANK], rtol=1e-5)


def test_olora_starts_from_orthonormal_columns():
    adapter, _, kernel = start("olora", alpha=float(RANK))
    a, b, _ = as_matrices("dense", adapter, kernel)
    np.testing.assert_allclose(a[0].T @ a[0], np.eye(RANK), atol=1e-6)
    np.testing.assert_allclose(b[0][:, :RANK], np.triu(b[0][:, :RANK]), atol=1e-6)


@pytest.mark.rows(4)
@pytest.mark.parametrize("name", KERNELS)
def test_orthogonal_columns_are_orthonormal(name):
    adapter, _, kernel = start("orthogonal", name)
    a, b, _ = as_matrices(name, adapter, kernel)
    assert np.all(b == 0)
    for matrix in a:
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(RANK), atol=1e-6)
    if len(a) > 1:
        assert not np.allclose(a[0], a[1])


# A rank above the smaller side of the kernel.


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["dense", "two out axes behind a stack of two axes"])
def test_a_rank_above_the_smaller_side_has_the_whole_kernel_or_a_product_of_zero(name, init):
    rank = 30
    adapter, base, kernel = start(init, name, rank=rank)
    axes, shape = KERNELS[name]
    assert {k: v.shape for k, v in adapter.items()} == axes.shapes(shape, rank)
    w = reference.as_stack_of_matrices(np.asarray(kernel, np.float64), axes)
    a = np.asarray(adapter["lora_a"], np.float64).reshape(len(w), -1, rank)
    b = np.asarray(adapter["lora_b"], np.float64).reshape(len(w), rank, -1)
    if init in FROM_KERNEL:
        assert reference.relative_error(16 / rank * a @ b, w) <= 1e-5
        assert same(base.init_a, adapter["lora_a"])
        assert np.all(np.any(a != 0, axis=1))  # each direction can be trained
    else:
        assert np.all(b == 0)
    if init == "orthogonal":
        for matrix in a:
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-6)


def test_kaiming_uniform_is_bounded_by_the_fan_in():
    """`U(-1/sqrt(in), 1/sqrt(in))`: of variance 1 / (3 in)."""
    for name in ("dense", "two in axes"):
        adapter, _, _ = start("kaiming_uniform", name, path=("a",), key=3)
        assert np.max(np.abs(adapter["lora_a"])) <= 1 / np.sqrt(24)
        assert np.all(np.asarray(adapter["lora_b"]) == 0)
    a = many_draws("kaiming_uniform")
    assert np.max(np.abs(a)) > 0.999 / np.sqrt(64)
    # The fourth moment of a uniform distribution gives its variance a spread of sqrt(4 / 5 n).
    assert abs(np.var(a) * 3 * 64 - 1) < 5 * np.sqrt(4 / 5 / a.size)
    assert abs(np.mean(a)) < 5 / np.sqrt(3 * 64 * a.size)


def test_gaussian_has_the_variance_of_the_rank():
    """`N(0, 1/r^2)`."""
    a = many_draws("gaussian") * RANK
    assert abs(np.var(a) - 1) < 5 * np.sqrt(2 / a.size)
    assert abs(np.mean(a)) < 5 / np.sqrt(a.size)
    assert abs(np.mean(a**4) - 3) < 5 * np.sqrt(96 / a.size)


def many_draws(init):
    config = dora.DoRAConfig(rank=RANK, init=init)
    axes = KernelAxes((0,), (1,), (2,))
    kernel = jnp.ones((256, 64, 5))
    adapter, _ = init_layer(
        config, config.layer_settings(()), ("a",), jax.random.key(0), kernel, axes
    )
    return np.asarray(adapter["lora_a"], np.float64)


# After training.


def changed_kernel(kernel, adapter, start, scaling):
    """`m V / ||V||` with `V = W0 + s (A B - A0 B0)`."""
    w, a, b, m = reference.wide(kernel, adapter["lora_a"], adapter["lora_b"], adapter["magnitude"])
    a0, b0 = reference.wide(start["lora_a"], start["lora_b"])
    v = w + scaling * (a @ b - a0 @ b0)
    return v * (m / np.sqrt(np.square(v).sum(-2)))[..., None, :]


def trained(adapters, seed=1):
    """Moves every array a little from where it starts, as training does."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.2 * jnp.std(leaf) * rng.normal(size=leaf.shape).astype(leaf.dtype),
        adapters,
    )


@pytest.mark.rows(2)
@pytest.mark.parametrize("init", FROM_KERNEL)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_layer_adds_the_change_of_the_product(front_end, init):
    model, x = model_with(front_end, init), inputs(7, CHAIN[0])
    adapters = trained(model.adapters)
    y = quick_jit(model.apply)(model.params, adapters, x)
    merged = model.merge(model.params, adapters)
    scaling = dora.DoRAConfig(rank=RANK).layer_settings(()).scaling
    (expected,) = reference.wide(x)
    for i, (name, layer) in enumerate(model.params.items()):
        kernel = changed_kernel(layer["kernel"], adapters[name], model.adapters[name], scaling)
        assert reference.relative_error(merged[name]["kernel"], kernel) <= 2e-6
        expected = expected if i == 0 else np.tanh(expected)
        expected = expected @ kernel + np.asarray(layer["bias"], np.float64)
    assert reference.relative_error(y, expected) <= 3e-6
    assert reference.relative_error(quick_jit(model.base)(merged, x), y) <= 1e-5
    assert reference.relative_error(quick_jit(model.base)(model.params, x), y) > 1e-2


@pytest.mark.rows(2)
@pytest.mark.parametrize("init", FROM_KERNEL)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_layers_of_a_stack_add_the_change_of_the_product(front_end, init):
    model, x = model_with(front_end, init, stack), inputs(7, WIDTH)
    adapters = trained(model.adapters)
    merged = model.merge(model.params, adapters)
    at_start, now = (tree["blocks"]["up"] for tree in (model.adapters, adapters))
    scaling = dora.DoRAConfig(rank=RANK).layer_settings(()).scaling
    kernel = changed_kernel(model.params["blocks"]["up"]["kernel"], now, at_start, scaling)
    assert kernel.shape == (LAYERS, WIDTH, WIDTH)
    assert reference.relative_error(merged["blocks"]["up"]["kernel"], kernel) <= 2e-6
    y = quick_jit(model.apply)(model.params, adapters, x)
    assert reference.relative_error(quick_jit(model.base)(merged, x), y) <= 1e-5


# The random key of a layer.


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "orthogonal"])
def test_a_draw_depends_only_on_key_and_path(init):
    a = start(init)[0]["lora_a"]
    assert same(start(init, alpha=1.0, target_modules=["other"], dropout=0.5)[0]["lora_a"], a)
    assert not same(start(init, key=1)[0]["lora_a"], a)
    assert not same(start(init, path=("layer_1",))[0]["lora_a"], a)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_layer_starts_the_same_whatever_else_is_adapted(front_end):
    both = model_with(front_end, "kaiming_uniform").adapters
    one = chain(front_end, dora.DoRAConfig(rank=RANK, target_modules=["layer_1"])).adapters
    assert same(one["layer_1"], both["layer_1"])
    assert not same(both["layer_0"]["lora_a"][:10], both["layer_1"]["lora_a"][:10])


@pytest.mark.parametrize(
    ("init", "indices"), [("kaiming_uniform", None), ("pissa", None), ("olora", (0, 2))]
)
def test_an_abstract_kernel_gives_the_shapes_of_a_real_one(init, indices):
    axes, shape = KERNELS["stack"]
    config = dora.DoRAConfig(rank=RANK, init=init, layers_to_transform=indices)
    *real, _ = start(init, "stack", layers_to_transform=indices, dtype=jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    path = ("layer",)
    abstract = init_layer(
        config, config.layer_settings(path), path, jax.random.key(0), kernel, axes
    )
    leaves = jax.tree.leaves(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tuple(real))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == expected
