"""Adapts, trains and merges a model as a user would, and measures what the laws are about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from tests.support import reference

STEPS = 8
LEARNING_RATE = 1e-2
CONFIG = dora.DoRAConfig(rank=2, alpha=4.0)

# Optimised code joins multiply-adds and orders sums by what stands around them, so that the same
# operations give other last bits in another program. As written, equal means equal.
AS_WRITTEN = {"xla_backend_optimization_level": 0}

Tree = Any
Axes = Mapping[str, dora.decomposition.KernelAxes]


@dataclasses.dataclass(frozen=True)
class LinenCase:
    """A Linen model and how it is called.

    Attributes:
      inputs: positional arguments of a call.
      config: what is adapted.
      kwargs: keyword arguments of a call for evaluation.
      train_kwargs: keyword arguments of a call for training.
      output: picks the logits, `(..., classes)`, from what the model returns.
      axes: axes of kernels that are not laid out as (stack, in, out), by the end of their path.
      mutable: collections that training writes.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    config: dora.DoRAConfig = CONFIG
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    output: Callable[[Any], jax.Array] = lambda output: output
    axes: Axes = dataclasses.field(default_factory=dict)
    mutable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NNXCase:
    """An NNX model and how it is called; attributes as for `LinenCase`."""

    model: nnx.Module
    inputs: tuple[Any, ...]
    config: dora.DoRAConfig = CONFIG
    output: Callable[[Any], jax.Array] = lambda output: output
    axes: Axes = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a model.

    Attributes:
      layers: number of adapted layers.
      trainable: number of trainable numbers.
      start: largest difference between base and adapted outputs before training, jitted.
      start_optimized: the same, as XLA optimises by default.
      losses: before and after training.
      base_unchanged: whether every base parameter kept every bit.
      idle: paths of adapter arrays that training left where they were, or made non-finite.
      merged: largest difference between merged and adapted outputs, after training.
      kernels: largest difference between merged kernels and a float64 NumPy DoRA's.
      scale: largest output.
    """

    layers: int
    trainable: int
    start: float
    start_optimized: float
    losses: tuple[float, float]
    base_unchanged: bool
    idle: list[str]
    merged: float
    kernels: float
    scale: float


def run(case: LinenCase | NNXCase) -> Report:
    return _run_linen(case) if isinstance(case, LinenCase) else _run_nnx(case)


def largest_difference(a: Any, b: Any) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def loss_of(logits: jax.Array) -> jax.Array:
    """Returns the cross-entropy of labels drawn at random: nothing to learn but by heart."""
    labels = jax.random.randint(jax.random.key(7), logits.shape[:-1], 0, logits.shape[-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def perturb(params: Tree) -> Tree:
    """Returns parameters as after pretraining: no bias is zero, no scale is one."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def _run_linen(case: LinenCase) -> Report:
    module, inputs = case.module, case.inputs
    init = jax.jit(lambda key, *inputs: module.init(key, *inputs, **case.kwargs))
    others = dict(init(jax.random.key(0), *inputs))
    params = perturb(others.pop("params"))
    model, adapters = dora.apply_dora(
        module,
        case.config,
        params=params,
        rng=jax.random.key(1),
        inputs=dora.linen.ExampleCall(inputs, kwargs=case.kwargs, variables=others),
    )
    tx = dora.dora_optimizer(LEARNING_RATE)

    def base(params, others, *inputs):
        return case.output(module.apply({"params": params, **others}, *inputs, **case.kwargs))

    def adapted(params, adapters, others, *inputs):
        variables = {"params": params, "dora": adapters, **others}
        return case.output(model.apply(variables, *inputs, **case.kwargs))

    @jax.jit
    def train_step(params, adapters, others, state, key, *inputs):
        def loss_fn(adapters):
            variables = {"params": params, "dora": adapters, **others}
            kwargs = {**case.kwargs, **case.train_kwargs, "rngs": {"dropout": key}}
            if not case.mutable:
                return loss_of(case.output(model.apply(variables, *inputs, **kwargs))), others
            output, updated = model.apply(variables, *inputs, mutable=case.mutable, **kwargs)
            return loss_of(case.output(output)), {**others, **updated}

        (loss, new_others), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), new_others, state, loss

    start = largest_difference(
        jax.jit(base, compiler_options=AS_WRITTEN)(params, others, *inputs),
        jax.jit(adapted, compiler_options=AS_WRITTEN)(params, adapters, others, *inputs),
    )
    base, adapted = jax.jit(base), jax.jit(adapted)
    start_optimized = largest_difference(
        base(params, others, *inputs), adapted(params, adapters, others, *inputs)
    )
    before, first, state, losses = jax.tree.map(np.array, params), adapters, tx.init(adapters), []
    for key in jax.random.split(jax.random.key(2), STEPS):
        adapters, others, state, loss = train_step(params, adapters, others, state, key, *inputs)
        losses.append(float(loss))
    merged = dora.merge(model, params, adapters)
    outputs = adapted(params, adapters, others, *inputs)
    return Report(
        layers=len(model.layers),
        trainable=dora.adapters.count_parameters(adapters)["total"],
        start=start,
        start_optimized=start_optimized,
        losses=(losses[0], losses[-1]),
        base_unchanged=_same(before, params),
        idle=_idle(first, adapters),
        merged=largest_difference(outputs, base(merged, others, *inputs)),
        kernels=_kernel_difference(case, _flat(params), _flat(merged), _flat(adapters)),
        scale=float(jnp.max(jnp.abs(outputs))),
    )


def _run_nnx(case: NNXCase) -> Report:
    nnx.update(case.model, perturb(nnx.state(case.model, nnx.Param)))
    base_model, inputs = case.model, case.inputs
    model = dora.apply_dora(base_model, case.config, rngs=nnx.Rngs(1), inputs=inputs)
    optimizer = nnx.Optimizer(model, dora.dora_optimizer(LEARNING_RATE), wrt=dora.DoRAParam)

    @nnx.jit
    def train_step(model, optimizer, *inputs):
        wrt = nnx.DiffState(0, dora.DoRAParam)
        loss_fn = lambda model: loss_of(case.output(model(*inputs)))  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    def call(graphdef, state, *inputs):
        return case.output(nnx.merge(graphdef, state)(*inputs))

    as_written = jax.jit(call, static_argnums=0, compiler_options=AS_WRITTEN)
    optimized = jax.jit(call, static_argnums=0)

    def outputs(model, function=optimized):
        return function(*nnx.split(model), *inputs)

    for each in (base_model, model):
        each.eval()
    start = largest_difference(outputs(base_model, as_written), outputs(model, as_written))
    start_optimized = largest_difference(outputs(base_model), outputs(model))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    first = dora.get_adapters(model)
    model.train()
    losses = [float(train_step(model, optimizer, *inputs)) for _ in range(STEPS)]
    model.eval()
    merged = dora.merge(model)
    adapters = dora.get_adapters(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    merged_params = nnx.to_pure_dict(nnx.state(merged, nnx.Param))
    final = outputs(model)
    return Report(
        layers=len({path[:-1] for path in _flat(adapters)}),
        trainable=dora.adapters.count_parameters(adapters)["total"],
        start=start,
        start_optimized=start_optimized,
        losses=(losses[0], losses[-1]),
        base_unchanged=_same(before, params),
        idle=_idle(first, adapters),
        merged=largest_difference(final, outputs(merged)),
        kernels=_kernel_difference(case, _flat(params), _flat(merged_params), _flat(adapters)),
        scale=float(jnp.max(jnp.abs(final))),
    )


def _same(a: Tree, b: Tree) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _flat(tree: Tree) -> dict[tuple[str, ...], np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _idle(before: Tree, after: Tree) -> list[str]:
    old, new = _flat(before), _flat(after)
    idle = [p for p in old if np.array_equal(old[p], new[p]) or not np.isfinite(new[p]).all()]
    return [".".join(path) for path in idle]


def _kernel_difference(case, params, merged, adapters) -> float:
    """Compares merged kernels with a float64 DoRA that knows nothing of Flax."""
    worst = 0.0
    for layer in sorted({path[:-1] for path in adapters if path[-1] == "lora_a"}):
        name = next(n for n in ("kernel", "w", "embedding") if (*layer, n) in params)
        kernel = params[(*layer, name)]
        stack = kernel.ndim - 2
        plain = dora.decomposition.KernelAxes(tuple(range(stack)), (stack,), (stack + 1,))
        ends = [axes for end, axes in case.axes.items() if ".".join(layer).endswith(end)]
        axes = ends[0] if ends else plain
        as_matrices = reference.as_stack_of_matrices
        w = as_matrices(kernel, axes)
        a, b, m = (adapters[(*layer, name)] for name in ("lora_a", "lora_b", "magnitude"))
        expected = reference.merged(
            w,
            a.reshape(*w.shape[:-1], a.shape[-1]),
            b.reshape(w.shape[0], b.shape[len(axes.stack)], w.shape[-1]),
            m.reshape(w.shape[0], w.shape[-1]),
            case.config.layer_settings(layer).scaling,
        )
        worst = max(worst, largest_difference(as_matrices(merged[(*layer, name)], axes), expected))
    return worst
