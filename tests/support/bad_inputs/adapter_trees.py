"""Mistakes with adapter trees: training, combining and precomputing them."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

import dora_jax as dora
from dora_jax import DoRAConfig
from dora_jax.errors import AdapterError, ConfigError
from tests.support.bad_inputs.models import (
    CONFIG,
    BadInput,
    LinenModel,
    NNXModel,
    X,
    adapt,
    adapters,
    ambiguous,
    linen_model,
    mixed,
    narrower,
    params,
    precomputed,
    without,
)

OPTIMISING = [
    BadInput(
        "the base's parameters",
        lambda: nnx.Optimizer(adapt(), dora.dora_optimizer(1e-3), wrt=nnx.Param),
        AdapterError,
        "^no adapter among the parameters .*: give wrt=DoRAParam, not the base's parameters",
    ),
    BadInput(
        "the base with its adapters",
        lambda: nnx.Optimizer(adapt(), dora.dora_optimizer(1e-3), wrt=...),
        AdapterError,
        r"^head\.\w+ is the frozen base of an adapted layer: .*wrt=DoRAParam in NNX",
    ),
    BadInput(
        "precomputed adapters",
        lambda: dora.dora_optimizer(1e-3).init(precomputed()),
        AdapterError,
        "^head.scale is a precomputed scale, .*: use the adapters that precompute_scales was given",
    ),
    BadInput(
        "a negative learning rate",
        lambda: dora.dora_optimizer(-1e-3),
        ConfigError,
        "^learning_rate must be a schedule or a number of at least 0, got -0.001",
    ),
    BadInput(
        "a learning rate in words",
        lambda: dora.dora_optimizer("1e-3"),
        ConfigError,
        "^learning_rate must be a schedule or a number of at least 0, got '1e-3'",
    ),
    BadInput(
        "a ratio that is not a number",
        lambda: dora.dora_optimizer(1e-3, magnitude_lr_ratio=float("nan")),
        ConfigError,
        "^magnitude_lr_ratio must be at least 0, got nan",
    ),
    BadInput(
        "a negative decay",
        lambda: dora.dora_optimizer(1e-3, magnitude_weight_decay=-0.1),
        ConfigError,
        "^magnitude_weight_decay must be at least 0, got -0.1",
    ),
    BadInput(
        "gradients clipped to nothing",
        lambda: dora.dora_optimizer(1e-3, max_grad_norm=0.0),
        ConfigError,
        "^max_grad_norm must be above 0, or None, got 0.0",
    ),
]

COMBINING = [
    BadInput(
        "weights of another sum",
        lambda: dora.adapters.interpolate([adapters(), adapters()], [0.5, 0.6]),
        AdapterError,
        "^the weights must sum to 1, these sum to 1.1",
    ),
    BadInput(
        "a weight missing",
        lambda: dora.adapters.add_weighted([adapters(), adapters()], [1.0], CONFIG),
        AdapterError,
        "a weight for each, got 2 trees and 1 weights",
    ),
    BadInput(
        "no tree",
        lambda: dora.adapters.stack_adapters([]),
        AdapterError,
        "^need at least one adapter tree",
    ),
    BadInput(
        "adapters of two ranks",
        lambda: dora.adapters.interpolate([adapters(), narrower()], [0.5, 0.5]),
        AdapterError,
        r"head.lora_a has shape \(6, 1\), the model needs \(6, 2\)",
    ),
    BadInput(
        "a layer missing in one of two",
        lambda: dora.adapters.diff(adapters(), without(adapters(), "head")),
        AdapterError,
        "missing head.lora_a",
    ),
    BadInput(
        "the configuration of another rank",
        lambda: dora.adapters.add_weighted([adapters()], [1.0], DoRAConfig(rank=4)),
        AdapterError,
        r": the adapters have rank 2, the configuration 4; pass the configuration that they",
    ),
    BadInput(
        "adapters that did not start at zero",
        lambda: dora.adapters.add_weighted([adapters()], [1.0], DoRAConfig(rank=2, init="olora")),
        AdapterError,
        "^adapters initialised with init='olora' cannot be added.*: merge each instead",
    ),
    BadInput(
        "a stack as long as the rank",
        lambda: dora.adapters.add_weighted([ambiguous()], [1.0], CONFIG),
        AdapterError,
        r"^up: the shapes of lora_a .* do not show how many axes are stack axes: pass axes, from",
    ),
    BadInput(
        "a mean of precomputed scales",
        lambda: dora.adapters.interpolate([precomputed(), precomputed()], [0.5, 0.5]),
        AdapterError,
        "^head.scale is a precomputed scale",
    ),
    BadInput(
        "adapters cast to integers",
        lambda: dora.adapters.cast_adapters(adapters(), jnp.int8),
        AdapterError,
        "^adapters are cast to a floating dtype, got int8",
    ),
    BadInput(
        "an index that is no integer",
        lambda: dora.adapters.select_adapters(dora.adapters.stack_adapters([adapters()]), 0.5),
        AdapterError,
        "^adapters are selected by integers, got an index of float32",
    ),
    BadInput(
        "an index for too many examples",
        lambda: mixed(jnp.array([0, 1, 0])),
        AdapterError,
        r"^every example needs .*: the index has shape \(3,\), an input has shape \(2, 6\)",
    ),
    BadInput(
        "a mixed batch without adapters",
        lambda: mixed(jnp.array([0, 1]), variables={"params": params()}),
        AdapterError,
        "^variables has no collection 'dora'",
    ),
    BadInput(
        "adapters that were not stacked",
        lambda: mixed(jnp.array([0, 1]), variables={"params": params(), "dora": adapters()}),
        AdapterError,
        r"head.lora_a has shape \(2,\), the model needs \(6, 2\)",
    ),
]

PRECOMPUTING = [
    BadInput(
        "a model without adapters (NNX)",
        lambda: dora.precompute_scales(NNXModel()),
        AdapterError,
        "^the model has no adapter: apply_dora first",
    ),
    BadInput(
        "a module without adapters (Linen)",
        lambda: dora.precompute_scales(LinenModel(), params(), adapters()),
        AdapterError,
        "^the module is not adapted: give the DoRAModel that apply_dora returned",
    ),
    BadInput(
        "no parameters",
        lambda: dora.precompute_scales(linen_model()),
        TypeError,
        "^a Linen model needs params, adapters too",
    ),
    BadInput(
        "adapters given with an NNX model",
        lambda: dora.precompute_scales(adapt(), None, adapters()),
        TypeError,
        "^an NNX model carries its arrays: leave out adapters",
    ),
    BadInput(
        "plain adapters for a precomputed model",
        lambda: dora.set_adapters(dora.precompute_scales(adapt()), dora.get_adapters(adapt())),
        AdapterError,
        "missing head.scale",
    ),
    BadInput(
        "adapters switched off where there are none",
        lambda: dora.disabled_adapters(NNXModel()),
        AdapterError,
        "^the model has no adapter: apply_dora first",
    ),
    BadInput(
        "an incomplete tree switched off",
        lambda: dora.disabled_adapters(linen_model(), without(adapters(), "head")),
        AdapterError,
        "^no entry head in the adapters",
    ),
    BadInput(
        "the summary of a plain model",
        lambda: dora.summary(NNXModel()),
        AdapterError,
        "^the model is not adapted: pass config=... for a dry run",
    ),
    BadInput(
        "a dry run of an adapted model",
        lambda: dora.summary(linen_model(), CONFIG, params=params()),
        AdapterError,
        "^the model is adapted already: a dry run takes the plain model",
    ),
    BadInput(
        "the summary of a Linen model without its parameters",
        lambda: dora.summary(LinenModel(), CONFIG, inputs=(X,)),
        TypeError,
        "^a Linen module needs params and inputs too",
    ),
]
