"""Mistakes in adapting, running and merging a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen, nnx

import dora_jax as dora
from dora_jax.errors import AdapterError, ConfigError, LayoutError
from dora_jax.layers import find_layout
from tests.support.bad_inputs.models import (
    CONFIG,
    BadInput,
    Doubled,
    LinenModel,
    NNXModel,
    PerCall,
    X,
    adapt,
    adapt_linen,
    adapters,
    apply,
    exchanged,
    linen_model,
    narrower,
    params,
    with_dropout_not_passed_on,
    without,
)

ADAPTING = [
    BadInput(
        "a dict for the configuration",
        lambda: dora.apply_dora(NNXModel(), {"rank": 2}, rngs=nnx.Rngs(0)),  # type: ignore[arg-type]
        TypeError,
        "^expected a DoRAConfig, got <class 'dict'>",
    ),
    BadInput(
        "parameters for the model",
        lambda: dora.apply_dora(params(), CONFIG, rngs=nnx.Rngs(0)),
        TypeError,
        "^expected a flax.nnx.Module or a flax.linen.Module, got <class 'dict'>",
    ),
    BadInput(
        "a key for the rngs",
        lambda: dora.apply_dora(NNXModel(), CONFIG, rngs=jax.random.key(0)),
        TypeError,
        r"^rngs must be an nnx.Rngs, as in rngs=nnx.Rngs\(0\)",
    ),
    BadInput(
        "an array for the tuple of inputs",
        lambda: dora.apply_dora(
            LinenModel(), CONFIG, params=params(), rng=jax.random.key(0), inputs=X
        ),
        TypeError,
        r"^inputs must be a tuple of the call's arguments, as in inputs=\(x,\)",
    ),
    BadInput(
        "all variables for the parameters",
        lambda: adapt_linen(given={"params": params()}),
        ConfigError,
        r"^params must be the collection itself: pass variables\['params'\]",
    ),
    BadInput(
        "parameters of another model",
        lambda: adapt_linen(given=without(params(), "head")),
        AdapterError,
        "^no entry head in the parameters",
    ),
    BadInput(
        "a model adapted twice (NNX)",
        lambda: adapt(adapt()),
        AdapterError,
        r"^the model is adapted already \(\S+ has an adapter\); merge it first",
    ),
    BadInput(
        "a model adapted twice (Linen)",
        lambda: adapt_linen(linen_model(), params()),
        AdapterError,
        "^the module is adapted already: merge it first",
    ),
    BadInput(
        "a layer with a call of its own",
        lambda: adapt(nnx.Dict(own=Doubled(6, 6, rngs=nnx.Rngs(0)))),
        LayoutError,
        r"^own cannot be adapted: Doubled has .* of its own.*register_layout\(Doubled, ...\)",
    ),
    BadInput(
        "a layer with an adapter of Flax's",
        lambda: adapt(nnx.Dict(own=nnx.LoRALinear(6, 6, lora_rank=2, rngs=nnx.Rngs(0)))),
        LayoutError,
        "^own cannot be adapted: it has a low-rank adapter already: merge it .* first",
    ),
    BadInput(
        "gates that are joined before they multiply",
        lambda: adapt_linen(linen.RNN(linen.OptimizedLSTMCell(6), name="rnn")),
        LayoutError,
        "cannot be adapted: OptimizedLSTMCell joins .*: use LSTMCell, .* or exclude_modules",
    ),
    BadInput(
        "a masked convolution",
        lambda: adapt(
            nnx.Dict(own=nnx.Conv(6, 6, 3, mask=jnp.ones((3, 6, 6)), rngs=nnx.Rngs(0))),
            target_modules=["own"],
        ),
        LayoutError,
        "^own cannot be adapted: Conv has a mask on its kernel, .*: exclude_modules",
    ),
    BadInput(
        "an equation given with each call, and no inputs",
        lambda: adapt(nnx.Dict(own=PerCall())),
        LayoutError,
        r"own.* its equation is given with each call.*: pass inputs=\(...\) to apply_dora",
    ),
    BadInput(
        "a layout that is none",
        lambda: dora.layers.register_layout(Doubled, None),  # type: ignore[arg-type]
        TypeError,
        "^expected a class and a Layout, got .*Doubled",
    ),
    BadInput(
        "a layout for an instance",
        lambda: dora.layers.register_layout(linen.Dense(3), find_layout(linen.Dense)),  # type: ignore[arg-type]
        TypeError,
        "^expected a class and a Layout, got Dense",
    ),
    BadInput(
        "a layout for another argument than the call has",
        lambda: dora.layers.register_layout(
            Doubled, dora.layers.einsum_layout(lambda layer, call: "bi,io->bo", inputs="x")
        ),
        LayoutError,
        r"^Doubled.__call__ takes \['inputs', .*\], not 'x': name the argument",
    ),
]

RUNNING = [
    BadInput(
        "no adapters",
        lambda: linen_model().apply({"params": params()}, X),
        AdapterError,
        "^variables has no collection 'dora': apply to .*, or use the module itself",
    ),
    BadInput(
        "adapters of another rank",
        lambda: apply(narrower()),
        AdapterError,
        r"head.lora_a has shape \(6, 1\), the model needs \(6, 2\)",
    ),
    BadInput(
        "an adapter without its magnitude",
        lambda: apply(without(adapters(), "head", "magnitude")),
        AdapterError,
        "^the adapters are of another model: missing head.magnitude",
    ),
    BadInput(
        "an adapter for a layer that there is not",
        lambda: apply({**adapters(), "tail": adapters()["head"]}),
        AdapterError,
        "^the adapters are of another model: unknown tail.lora_a",
    ),
    BadInput(
        "a scan that does not pass the dropout stream on",
        with_dropout_not_passed_on,
        AdapterError,
        "^blocks.up: adapter dropout needs the stream 'dropout', .*; add it to split_rngs",
    ),
    BadInput(
        "adapters put into a model that has none",
        lambda: dora.set_adapters(NNXModel(), dora.get_adapters(adapt())),
        AdapterError,
        "^the model has no adapter: apply_dora first",
    ),
    BadInput(
        "adapters of another rank put into a model",
        lambda: dora.set_adapters(adapt(), dora.get_adapters(adapt(rank=1))),
        AdapterError,
        r"head.lora_a has shape \(6, 1\), the model needs \(6, 2\)",
    ),
    BadInput(
        "a base exchanged after adapting",
        lambda: dora.check_base(exchanged()),
        AdapterError,
        "^head: the kernel changed since apply_dora.* Load the base first, then adapt it",
    ),
]

MERGING = [
    BadInput(
        "a model merged twice (NNX)",
        lambda: dora.merge(dora.merge(adapt())),
        AdapterError,
        "^the model has no adapter: apply_dora first; a merged one has none left",
    ),
    BadInput(
        "a base exchanged before merging",
        lambda: dora.merge(exchanged()),
        AdapterError,
        "^head: the kernel changed since apply_dora",
    ),
    BadInput(
        "adapters given with an NNX model",
        lambda: dora.merge(adapt(), params(), adapters()),
        TypeError,
        "^an NNX model carries its arrays: leave out params, adapters",
    ),
    BadInput(
        "no adapters",
        lambda: dora.merge(linen_model(), params()),
        TypeError,
        "^a Linen model needs adapters too",
    ),
    BadInput(
        "the model in the last place",
        lambda: dora.merge(params(), adapters(), linen_model()),
        TypeError,
        "^expected an adapted flax.nnx.Module or a DoRAModel, got <class 'dict'>",
    ),
    BadInput(
        "the plain module for the adapted one",
        lambda: dora.merge(LinenModel(), params(), adapters()),
        AdapterError,
        "^the module is not adapted: give the DoRAModel that apply_dora returned",
    ),
    BadInput(
        "an empty adapter tree",
        lambda: dora.merge(linen_model(), params(), {}),
        AdapterError,
        "^the adapter tree is empty: nothing to merge",
    ),
    BadInput(
        "adapters of another configuration",
        lambda: dora.merge(linen_model(), params(), adapt_linen(decompose=False)[1]),
        AdapterError,
        "missing head.magnitude",
    ),
    BadInput(
        "kernels of another shape",
        lambda: dora.merge(
            linen_model(), {**params(), "head": {"kernel": jnp.ones((6, 4))}}, adapters()
        ),
        AdapterError,
        r"^head: the kernel has shape \(6, 4\), its adapter is for .* \(3,\).* it was made for",
    ),
    BadInput(
        "a module trained in full that is missing",
        lambda: dora.merge(adapt_linen(modules_to_save=["norm"])[0], params(), adapters()),
        AdapterError,
        "missing norm.",
    ),
]
