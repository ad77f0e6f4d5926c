"""No merge of adapters that are not finite; gradients in float16 that float32 could hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import dora_jax as dora
from dora_jax.errors import AdapterError
from tests.support.models import (
    FRONT_ENDS,
    adapted_chain,
    linen_variables,
    nnx_model,
    random_adapters,
)
from tests.support.quick import quick_jit

CONFIG = dora.DoRAConfig(rank=2, target_modules=["layer_0"], modules_to_save=["layer_1"])


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_adapters_that_are_not_finite_are_not_merged(front_end):
    chain = adapted_chain(front_end, CONFIG, (4, 3, 2))
    for layer, name, value in [
        ("layer_0", "lora_a", np.nan),
        ("layer_0", "magnitude", np.inf),
        ("layer_1", "bias", -np.inf),
    ]:
        own = chain.adapters[layer]
        bad = chain.adapters | {layer: own | {name: own[name].at[..., 0].set(value)}}
        with pytest.raises(AdapterError, match=rf"^{layer}\.{name} is not finite"):
            chain.merge(chain.params, bad)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_merged_kernel_that_its_dtype_cannot_hold_is_refused(front_end):
    config = dora.DoRAConfig(rank=2)
    chain = adapted_chain(front_end, config, (4, 3), param_dtype=jnp.float16)
    own = chain.adapters["layer_0"]
    huge = {"layer_0": own | {"magnitude": own["magnitude"] * 1e6}}
    with pytest.raises(AdapterError, match=r"^layer_0: the merged kernel does not fit"):
        chain.merge(chain.params, huge)


# Layers of the default set, then of the full one; all are called on (batch, 6, 8) in float16.
HALF = {"dtype": jnp.float16, "param_dtype": jnp.float16}
LAYERS = {
    "Linear": lambda rngs: nnx.Linear(8, 16, **HALF, rngs=rngs),
    "Conv": lambda rngs: nnx.Conv(8, 16, (3,), **HALF, rngs=rngs),
    "promoted": lambda rngs: nnx.Linear(8, 16, param_dtype=jnp.float16, rngs=rngs),
    "LinearGeneral": lambda rngs: nnx.LinearGeneral(8, (4, 4), **HALF, rngs=rngs),
    "Einsum": lambda rngs: nnx.Einsum("bti,io->bto", (8, 16), (16,), **HALF, rngs=rngs),
    "grouped": lambda rngs: nnx.Conv(8, 16, (3,), feature_group_count=2, **HALF, rngs=rngs),
}
LINEN = {
    "Dense": linen.Dense(16, **HALF),
    "Conv (Linen)": linen.Conv(16, (3,), **HALF),
}


def gradients_of_nnx(make, config, g, x):
    model = dora.apply_dora(
        nnx_model(lambda rngs: nnx.Sequential(make(rngs))), config, rngs=nnx.Rngs(1)
    )
    dora.set_adapters(model, random_adapters(dora.get_adapters(model)))
    graphdef, trained, rest = nnx.split(model, dora.DoRAParam, ...)

    @quick_jit
    def gradients(trained, rest, g):
        y, transpose = jax.vjp(lambda trained: nnx.merge(graphdef, trained, rest)(x), trained)
        return transpose(jnp.full(y.shape, g, y.dtype))[0]

    return [jax.tree.leaves(gradients(trained, rest, g)) for g in (g, 1.0)]


def gradients_of_linen(module, config, g, x):
    params = linen_variables(module, x)["params"]
    model, adapters = dora.apply_dora(
        module, config, params=params, rng=jax.random.key(1), inputs=(x,)
    )

    @quick_jit
    def gradients(adapters, g):
        y, transpose = jax.vjp(
            lambda own: model.apply({"params": params, "dora": own}, x), adapters
        )
        return transpose(jnp.full(y.shape, g, y.dtype))[0]

    adapters = random_adapters(adapters)
    return [jax.tree.leaves(gradients(adapters, g)) for g in (g, 1.0)]


def cases():
    for name, make in {**LAYERS, **LINEN}.items():
        for norm_gradient in ("exact", "detached"):
            default = name in ("Linear", "Dense") and norm_gradient == "exact"
            gradients = gradients_of_nnx if name in LAYERS else gradients_of_linen
            yield pytest.param(
                gradients,
                make,
                norm_gradient,
                id=f"{gradients.__name__}-{name}-{norm_gradient}",
                marks=() if default else pytest.mark.full,
            )


@pytest.mark.parametrize(("gradients", "make", "norm_gradient"), list(cases()))
def test_a_scaled_loss_in_float16_has_the_gradients_of_a_plain_one(gradients, make, norm_gradient):
    """They are above 65504, the largest number of float16."""
    config = dora.DoRAConfig(rank=2, alpha=8.0, target_modules=".*", norm_gradient=norm_gradient)
    x = jnp.asarray(np.abs(np.random.default_rng(0).normal(size=(2, 6, 8))), jnp.float16)
    scaled, plain = gradients(make, config, 2.0**14, x)
    assert max(float(jnp.max(jnp.abs(x))) for x in scaled) > 65504
    for one, other in zip(scaled, plain, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(
            one / 2.0**14, other, rtol=2e-2, atol=2e-2 * float(jnp.max(jnp.abs(other)))
        )
