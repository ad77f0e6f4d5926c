"""Mistakes, and the errors that name them. As a script, prints them as a Markdown table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import dora_jax as dora
from dora_jax import AdapterError, ConfigError, DoRAConfig, LayoutError
from dora_jax.layers import find_layout

CONFIG = DoRAConfig(rank=2)
X = jnp.ones((2, 6))


class BadInput(NamedTuple):
    """A mistake.

    Attributes:
      what: the mistake, in words.
      how: makes it.
      error: the class of the error, exactly.
      message: a regular expression in it: the layer or field, and the mend.
    """

    what: str
    how: Callable[[], Any]
    error: type[Exception]
    message: str


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return jnp.tanh(linen.Dense(6, name="up")(x)), None


class LinenModel(linen.Module):
    """Two numbered layers, a norm and a head."""

    @linen.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = LinenBlock(name=f"layers_{i}")(x)
        return linen.Dense(3, name="head")(linen.LayerNorm(name="norm")(x))


class LinenStack(linen.Module):
    streams: tuple[str, ...] = ("params", "dropout")

    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs=dict.fromkeys(self.streams, True),
            length=4,
        )
        return scan(name="blocks")(x, None)[0]


class NNXModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Dict(up=nnx.Linear(6, 6, rngs=rngs)) for _ in range(2)])
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer.up(x))
        return self.head(self.norm(x))


class Doubled(nnx.Linear):
    """Uses its kernel in a way that is not known."""

    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs)


class PerCall(nnx.Module):
    """Takes its equation with each call."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((6, 6)))

    def __call__(self, equation, inputs):
        return jnp.einsum(equation, inputs, self.kernel[...])


dora.layers.register_layout(
    PerCall, dora.layers.einsum_layout(lambda layer, call: call.get("equation"))
)


@functools.cache
def params(module: linen.Module = LinenModel()) -> dict[str, Any]:  # noqa: B008
    return module.init(jax.random.key(0), X)["params"]


def adapt_linen(module: Any = LinenModel(), given: Any = None, **fields: Any) -> Any:  # noqa: B008
    return dora.apply_dora(
        module,
        DoRAConfig(**{"rank": 2, **fields}),
        params=params(module) if given is None else given,
        rng=jax.random.key(1),
        inputs=(X,),
    )


def adapt(model: Any = None, **fields: Any) -> Any:
    model = NNXModel() if model is None else model
    return dora.apply_dora(model, DoRAConfig(**{"rank": 2, **fields}), rngs=nnx.Rngs(1))


@functools.cache
def linen_model() -> Any:
    return adapt_linen()[0]


@functools.cache
def adapters() -> dict[str, Any]:
    return adapt_linen()[1]


def without(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    """Returns nested dicts without the entry at a path."""
    key, *rest = path
    if rest:
        return {**tree, key: without(tree[key], *rest)}
    return {k: v for k, v in tree.items() if k != key}


def narrower() -> dict[str, Any]:
    """Adapters of rank 1."""
    return adapt_linen(rank=1)[1]


def precomputed() -> dict[str, Any]:
    return dora.precompute_scales(linen_model(), params(), adapters())


def exchanged() -> nnx.Module:
    """An adapted model whose head came from elsewhere afterwards."""
    model = adapt()
    model.head.kernel[...] = model.head.kernel[...] + 1.0
    return model


def apply(tree: Any, x: Any = X, **options: Any) -> Any:
    return linen_model().apply({"params": params(), "dora": tree}, x, **options)


def with_dropout_not_passed_on() -> Any:
    module = LinenStack(streams=("params",))
    model, tree = adapt_linen(module, dropout=0.5)
    variables = {"params": params(module), "dora": tree}
    return model.apply(variables, X, rngs={"dropout": jax.random.key(0)})


def mixed(index: Any, *, variables: Any = None) -> Any:
    stacked = dora.adapters.stack_adapters([adapters(), adapters()])
    variables = {"params": params(), "dora": stacked} if variables is None else variables
    return dora.apply_mixed(linen_model(), variables, index, X)


def ambiguous() -> dict[str, Any]:
    """A stack as long as the rank."""
    return {"up": {"lora_a": jnp.ones((2, 6, 2)), "lora_b": jnp.ones((2, 2, 6))}}


CONFIGURATION = [
    BadInput("a negative rank", lambda: DoRAConfig(rank=-1), ConfigError, r"^rank must .* least 0"),
    BadInput("half a rank", lambda: DoRAConfig(rank=2.5), ConfigError, "^rank must be an integer"),  # type: ignore[arg-type]
    BadInput("alpha 0", lambda: DoRAConfig(alpha=0), ConfigError, "^alpha must .* above 0, got 0"),
    BadInput(
        "alpha not a number",
        lambda: DoRAConfig(alpha=float("nan")),
        ConfigError,
        "^alpha must be a finite number above 0, got nan",
    ),
    BadInput(
        "a dropout that drops everything",
        lambda: DoRAConfig(dropout=1.0),
        ConfigError,
        r"^dropout must be in \[0, 1\), got 1.0",
    ),
    BadInput("eps 0", lambda: DoRAConfig(eps=0.0), ConfigError, "^eps must be .* above 0, got 0.0"),
    BadInput(
        "no target",
        lambda: DoRAConfig(target_modules=[]),
        ConfigError,
        "^target_modules is empty: name layers, or use 'all-linear'",
    ),
    BadInput(
        "None for the targets",
        lambda: DoRAConfig(target_modules=None),  # type: ignore[arg-type]
        ConfigError,
        "^target_modules must be a list, got None",
    ),
    BadInput(
        "a target that is no regular expression",
        lambda: DoRAConfig(target_modules="layers.(up"),
        ConfigError,
        r"^target_modules: 'layers.\(up' is no regular expression",
    ),
    BadInput(
        "a negative rank for one layer",
        lambda: DoRAConfig(rank_pattern={"up": -1}),
        ConfigError,
        r"^rank_pattern\['up'\] must be an integer of at least 0",
    ),
    BadInput(
        "a list of pairs for the ranks",
        lambda: DoRAConfig(rank_pattern=[("up", 1)]),  # type: ignore[arg-type]
        ConfigError,
        "^rank_pattern must be a dict with patterns for keys",
    ),
    BadInput(
        "an unknown gradient of the norm",
        lambda: DoRAConfig(norm_gradient="none"),  # type: ignore[arg-type]
        ConfigError,
        r"^norm_gradient must be one of \('exact', 'detached'\), got 'none'",
    ),
    BadInput(
        "an unknown start",
        lambda: DoRAConfig(init="eva"),  # type: ignore[arg-type]
        ConfigError,
        r"^init must be one of \(.*'pissa', 'olora'\), got 'eva'",
    ),
    BadInput(
        "adapters of integers",
        lambda: DoRAConfig(adapter_dtype="int8"),
        ConfigError,
        "^adapter_dtype must be a floating dtype, got int8",
    ),
    BadInput(
        "a word for a switch",
        lambda: DoRAConfig(decompose="yes"),  # type: ignore[arg-type]
        ConfigError,
        "^decompose must be True or False, got 'yes'",
    ),
    BadInput(
        "rank 0 without a magnitude",
        lambda: DoRAConfig(rank=0, magnitude_trainable=False),
        ConfigError,
        "^rank 0 trains the magnitude alone, so it needs .*magnitude_trainable=True",
    ),
    BadInput(
        "one name for the modules to save",
        lambda: DoRAConfig(modules_to_save="head"),
        ConfigError,
        r"^modules_to_save must be a list of names: \['head'\]",
    ),
    BadInput(
        "one number for the layers",
        lambda: DoRAConfig(layers_to_transform=3),  # type: ignore[arg-type]
        ConfigError,
        "^layers_to_transform must be a list, got 3",
    ),
    BadInput(
        "a layer counted from behind",
        lambda: DoRAConfig(layers_to_transform=[-1]),
        ConfigError,
        r"^layers_to_transform must hold integers of at least 0, got \[-1\]",
    ),
    BadInput(
        "a pattern for numbers, without numbers",
        lambda: DoRAConfig(layers_pattern="layers"),
        ConfigError,
        "^layers_pattern needs layers_to_transform",
    ),
    BadInput(
        "several patterns for numbers",
        lambda: DoRAConfig(layers_to_transform=[0], layers_pattern=["layers"]),  # type: ignore[arg-type]
        ConfigError,
        r"^layers_pattern must be one name, such as 'layers', got \['layers'\]",
    ),
    BadInput(
        "JSON with a field of PEFT's",
        lambda: DoRAConfig.from_json('{"r": 8}'),
        ConfigError,
        r"^unknown fields \['r'\]; the known ones are .*'rank'",
    ),
    BadInput(
        "JSON cut short",
        lambda: DoRAConfig.from_json(CONFIG.to_json()[:40]),
        ConfigError,
        "^the DoRA configuration is not valid JSON",
    ),
]

SELECTION = [
    BadInput(
        "a misspelt target (NNX)",
        lambda: adapt(target_modules=["upp"]),
        ConfigError,
        r"^target_modules entry 'upp' matches nothing. Nearest names: \['layers.0.up'",
    ),
    BadInput(
        "a misspelt target (Linen)",
        lambda: adapt_linen(target_modules=["upp"]),
        ConfigError,
        r"^target_modules entry 'upp' matches nothing. Nearest names: \['layers_0.up'",
    ),
    BadInput(
        "a regular expression for the end of a path",
        lambda: adapt(target_modules="up"),
        ConfigError,
        "^target_modules='up' fully matches no layer's dotted path. .*: head, layers.0.up",
    ),
    BadInput(
        "a norm for a target",
        lambda: adapt_linen(target_modules=["norm"]),
        LayoutError,
        "^target_modules names 'norm', but that module is no layer .* Name the layers inside it",
    ),
    BadInput(
        "every target excluded",
        lambda: adapt(exclude_modules=["up", "head"]),
        ConfigError,
        "^no layer matched target_modules='all-linear'.*: head, layers.0.up, layers.1.up",
    ),
    BadInput(
        "a misspelt exclusion",
        lambda: adapt(exclude_modules=["haed"]),
        ConfigError,
        r"^exclude_modules entry 'haed' matches nothing. Nearest names: \['head'",
    ),
    BadInput(
        "a misspelt module to save",
        lambda: adapt_linen(modules_to_save=["haed"]),
        ConfigError,
        r"^modules_to_save entry 'haed' matches nothing. Nearest names: \['head'",
    ),
    BadInput(
        "a rank for a layer that is not adapted",
        lambda: adapt(target_modules=["up"], rank_pattern={"head": 1}),
        ConfigError,
        "^rank_pattern key 'head' matches no adapted layer. .*: layers.0.up",
    ),
    BadInput(
        "a rank above the kernel's",
        lambda: adapt_linen(rank=4),
        ConfigError,
        r"^head: rank 4 is above the smaller side of its kernel \(6 in, 3 out\); .*rank_pattern",
    ),
    BadInput(
        "the number of no layer",
        lambda: adapt(layers_to_transform=[0, 2]),
        ConfigError,
        r"^layers_to_transform asks for \[2\], but no layer that target_modules selects has",
    ),
    BadInput(
        "a number behind the name of no module",
        lambda: adapt_linen(layers_to_transform=[0], layers_pattern="blocks"),
        ConfigError,
        r"^layers_to_transform asks for \[0\].*\(layers_pattern='blocks'\)",
    ),
    BadInput(
        "a number for a layer that has none",
        lambda: adapt(target_modules=["head"], layers_to_transform=[0]),
        ConfigError,
        r"^layers_to_transform asks for \[0\], but no layer .* nor is one a stack",
    ),
    BadInput(
        "a place behind the end of a stack",
        lambda: adapt_linen(LinenStack(), layers_to_transform=[4]),
        ConfigError,
        r"^blocks.up: layers_to_transform asks for \[4\], but the stack has 4 layers",
    ),
]

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
        "adapters beside an NNX model",
        lambda: dora.merge(adapt(), adapters(), CONFIG),
        TypeError,
        r"^merge\(model\) takes an NNX model alone: it carries its adapters",
    ),
    BadInput(
        "no configuration",
        lambda: dora.merge(params(), adapters()),
        TypeError,
        "^merge takes an NNX model, or params, adapters and config",
    ),
    BadInput(
        "the plain module for the configuration",
        lambda: dora.merge(params(), adapters(), LinenModel()),
        TypeError,
        r"^merge takes an NNX model, or params, adapters and config \(or the DoRAModel\)",
    ),
    BadInput(
        "an empty adapter tree",
        lambda: dora.merge(params(), {}, CONFIG),
        AdapterError,
        "^the adapter tree is empty: nothing to merge",
    ),
    BadInput(
        "another configuration",
        lambda: dora.merge(params(), adapters(), DoRAConfig(decompose=False)),
        AdapterError,
        r"^\w+(\.up)?: the configuration asks for \['lora_a', 'lora_b'\], the adapter has",
    ),
    BadInput(
        "kernels of another shape",
        lambda: dora.merge({**params(), "head": {"kernel": jnp.ones((6, 4))}}, adapters(), CONFIG),
        AdapterError,
        r"^head: the adapter .* does not fit the kernel \(6, 4\).*; check the base, or pass the",
    ),
    BadInput(
        "PiSSA by the configuration alone",
        lambda: dora.merge(params(), adapt_linen(init="pissa")[1], DoRAConfig(init="pissa")),
        AdapterError,
        r": init='pissa' and layers_to_transform need .*: pass the adapted model",
    ),
    BadInput(
        "a module trained in full that is missing",
        lambda: dora.merge(params(), adapters(), DoRAConfig(rank=2, modules_to_save=["norm"])),
        AdapterError,
        "^the adapters lack a module trained in full: modules_to_save entry 'norm'",
    ),
]

OPTIMISING = [
    BadInput(
        "the base's parameters",
        lambda: dora.dora_optimizer(1e-3).init(params()),
        AdapterError,
        "^no adapter among the parameters .*: give the adapter tree .* not the base's parameters",
    ),
    BadInput(
        "the base beside its adapters",
        lambda: nnx.Optimizer(adapt(), dora.dora_optimizer(1e-3), wrt=...),
        AdapterError,
        r"\.kernel|\.base_norm is the frozen base of an adapted layer: .*wrt=DoRAParam in NNX",
    ),
    BadInput(
        "precomputed adapters",
        lambda: dora.dora_optimizer(1e-3).init(precomputed()),
        AdapterError,
        "^head.scale is a precomputed scale, .*: use the adapters that were precomputed",
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
    BadInput(
        "parameters counted of the base",
        lambda: dora.adapters.count_parameters(params()),
        AdapterError,
        "^no adapter among the parameters",
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
        r": the adapters have rank 2, the configuration 4; its scaling would not be theirs",
    ),
    BadInput(
        "adapters that did not start at zero",
        lambda: dora.adapters.add_weighted([adapters()], [1.0], DoRAConfig(rank=2, init="olora")),
        AdapterError,
        "^adapters that started with init='olora' act by what they changed.*: merge each instead",
    ),
    BadInput(
        "a stack as long as the rank",
        lambda: dora.adapters.add_weighted([ambiguous()], [1.0], CONFIG),
        AdapterError,
        r"^up: the shapes .* do not tell how many axes are stack; pass stack_axes",
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

HOISTING = [
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
        "adapters beside an NNX model",
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
        "^the model is adapted already: a dry run takes the module itself",
    ),
    BadInput(
        "the summary of a Linen model without its parameters",
        lambda: dora.summary(LinenModel(), CONFIG, inputs=(X,)),
        TypeError,
        "^a Linen model needs params too",
    ),
]

BAD_INPUTS = {
    "DoRAConfig": CONFIGURATION,
    "selection": SELECTION,
    "apply_dora": ADAPTING,
    "running": RUNNING,
    "merge": MERGING,
    "dora_optimizer": OPTIMISING,
    "adapter operations": COMBINING,
    "precompute and summary": HOISTING,
}


def raised(bad: BadInput) -> Exception | None:
    """Returns what a mistake raises."""
    try:
        bad.how()
    except Exception as error:
        return error
    return None


def markdown(table: dict[str, list[BadInput]]) -> Iterable[str]:
    """Yields the lines of a Markdown table: where, the mistake, what is raised."""
    yield "| where | mistake | error |"
    yield "|---|---|---|"
    for where, rows in table.items():
        for bad in rows:
            error = raised(bad)
            message = str(error).replace("|", r"\|").replace("\n", " ")
            yield f"| {where} | {bad.what} | `{type(error).__name__}`: {message} |"


if __name__ == "__main__":
    for line in markdown(BAD_INPUTS):
        print(line)
