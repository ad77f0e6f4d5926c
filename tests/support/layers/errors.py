"""Every layer type, in both front ends, against DoRA by definition in float64 NumPy.

`python -m tests.support.layers.errors` prints the largest relative errors as a Markdown table.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dora_jax as dora
from tests.support import reference
from tests.support.layers.models import COPIES, STACKED, TRANSFORMS, Adapted, model
from tests.support.layers.rows import Row
from tests.support.layers.table import ROWS, UNSUPPORTED
from tests.support.quick import quick_jit

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SCALING = 1.5

Tree = dict[str, Any]
# Arrays by dotted name.
Arrays = dict[str, np.ndarray]


class Errors(NamedTuple):
    """Largest relative errors; of the gradients, over lora_a, lora_b and magnitude.

    The detached gradient is None where it was not asked for.
    """

    forward: float
    exact_gradient: float
    detached_gradient: float | None
    merge: float


# What the tests hold the table to. A bfloat16 number is off by up to 2^-9 = 2e-3 of itself; the
# exact gradient is a difference, and the rounding of few inputs does not average out.
BOUNDS = {
    "float32": Errors(2e-6, 2e-5, 2e-5, 2e-6),
    "bfloat16": Errors(1e-2, 5e-2, 3e-2, 4e-3),
}


class Data(NamedTuple):
    """The numbers of a row; every array has a leading axis of copies."""

    params: Arrays
    adapters: Arrays
    x: np.ndarray
    weights: np.ndarray


class Expected(NamedTuple):
    """What follows from `Data` by definition; copies in front."""

    y: np.ndarray
    kernels: Arrays
    exact: Arrays
    detached: Arrays


def config(row: Row, **fields: Any) -> dora.DoRAConfig:
    """Returns a configuration for the kernels of a row."""
    modules = [name.rpartition(".")[0] or "layer" for name in row.kernels]
    return dora.DoRAConfig(
        **{
            "rank": row.rank,
            "alpha": SCALING * row.rank,
            "target_modules": modules or ".*",
            **fields,
        }
    )


def errors(
    row: Row,
    dtype: Any,
    transforms: Sequence[str] = TRANSFORMS,
    detached: Sequence[str] | None = None,
    data: Data | None = None,
) -> dict[str, Errors]:
    """Returns the errors of a row under each transform, all from one program.

    Args:
      row: the layer.
      dtype: of its parameters and computation.
      transforms: how the layer is run.
      detached: the transforms under which the detached gradient is computed too; all by default.
      data: the numbers; by default those of `draw_data`.

    Raises:
      LayoutError: the layer is refused.
    """
    detached = transforms if detached is None else detached
    numbers = data or draw_data(row, dtype)
    truth = expected(row, numbers)
    params, adapters = (tree(a, transforms) for a in (numbers.params, numbers.adapters))
    xs, weights = (copies(a, transforms) for a in (numbers.x, numbers.weights))

    def adapt(kind: str, transforms: Sequence[str], params: Tree) -> Adapted:
        layers = model(row, dtype, dtype, tuple(transforms))
        chosen, inputs = ({t: a[t] for t in transforms} for a in (params, xs))
        return layers.adapt(config(row, norm_gradient=kind), chosen, inputs)

    def loss(adapted: Adapted, adapters: Tree) -> tuple[Any, Tree]:
        ys = adapted.apply(adapters, {t: xs[t] for t in adapters})
        return sum(jnp.sum(weights[t] * y.astype(jnp.float32)) for t, y in ys.items()), ys

    @quick_jit
    def everything(adapters: Tree, params: Tree) -> tuple[Tree, ...]:
        exact = adapt("exact", transforms, params)
        by_exact, ys = jax.grad(functools.partial(loss, exact), has_aux=True)(adapters)
        by_detached: Tree = {}
        if chosen := {t: adapters[t] for t in detached}:
            held = adapt("detached", detached, params)
            by_detached, _ = jax.grad(functools.partial(loss, held), has_aux=True)(chosen)
        return ys, by_exact, by_detached, exact.merge(adapters)

    ys, *found = everything(adapters, params)

    def largest(found: Tree, wanted: Arrays, t: str) -> float:
        return max(relative_error(_get(found[t]["layer"], k), v, t) for k, v in wanted.items())

    by_exact, by_detached, merged = found
    return {
        t: Errors(
            relative_error(ys[t], truth.y, t),
            largest(by_exact, truth.exact, t),
            largest(by_detached, truth.detached, t) if t in detached else None,
            largest(merged, truth.kernels, t),
        )
        for t in transforms
    }


def copies(array: np.ndarray, transforms: Sequence[str]) -> dict[str, jax.Array]:
    """Returns what each transform has of an array with a leading axis of copies."""
    return {t: jnp.asarray(array if t in STACKED else array[0]) for t in transforms}


def tree(arrays: Arrays, transforms: Sequence[str]) -> Tree:
    """Returns the tree of a model of `tests.support.layers.models`."""
    by_name = {name: copies(array, transforms) for name, array in arrays.items()}
    return {t: {"layer": nested({k: v[t] for k, v in by_name.items()})} for t in transforms}


def relative_error(value: Any, expected: np.ndarray, transform: str) -> float:
    expected = expected if transform in STACKED else expected[0]
    assert np.shape(value) == expected.shape
    return reference.relative_error(value, expected)


def draw_data(row: Row, dtype: Any) -> Data:
    """Draws parameters, adapters as after long training, inputs, and the weights of the loss."""
    rng = np.random.default_rng(0)

    def draw(shape: Sequence[int], dtype: Any = jnp.float32) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.normal(size=(COPIES, *shape)) / 2, dtype))

    params = {name: draw(shape, dtype) for name, shape in row.params.items()}
    adapters = {}
    for name, axes in row.kernels.items():
        for part, shape in axes.shapes(row.params[name], row.rank).items():
            adapters[adapter_name(name, part)] = draw(shape)
        norms = np.stack(
            [reference.norm(reference.as_stack_of_matrices(k, axes)) for k in params[name]]
        )
        drift = np.exp(adapters[adapter_name(name, "magnitude")])
        magnitude = norms.reshape(drift.shape) * drift
        adapters[adapter_name(name, "magnitude")] = magnitude.astype(np.float32)
    x = rng.integers(0, row.vocab, (COPIES, *row.x)) if row.vocab else draw(row.x, dtype)
    return Data(params, adapters, x, draw((COPIES, *_run(row, wide(params, 0), x[0]).shape)[1:]))


def shrunk(row: Row, dtype: Any, delta: float, every: bool = True) -> tuple[Row, Data]:
    """Returns a row of full rank, and numbers that shrink `W0 + s A B` to about `delta ||W0||`.

    Not of every column, but of one, if `every` is false. One factor is the identity, the other one
    `(delta R - W0) / s` in 20 bits, so that its product with `s` is exact.
    """
    ((name, axes),) = row.kernels.items()
    stack, inputs, outputs = (int(np.prod([row.params[name][i] for i in g])) for g in axes)
    row = dataclasses.replace(row, rank=min(inputs, outputs))
    data, rng = draw_data(row, dtype), np.random.default_rng(1)
    kernel = np.stack([reference.as_stack_of_matrices(k, axes) for k in data.params[name]])
    change = (delta * rng.normal(size=kernel.shape) / 2 - kernel.astype(np.float64)) / SCALING
    bits = change.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFFFF0)
    change = bits.view(np.float32) * (np.ones(outputs) if every else np.arange(outputs) == 1)
    identity = np.broadcast_to(np.eye(row.rank), (COPIES, stack, row.rank, row.rank))
    factors = (change, identity) if outputs <= inputs else (identity, change)
    adapters = dict(data.adapters)
    for part, factor in zip(("lora_a", "lora_b"), factors, strict=True):
        like = adapters[adapter_name(name, part)]
        adapters[adapter_name(name, part)] = factor.astype(np.float32).reshape(like.shape)
    return row, data._replace(adapters=adapters)


def expected(row: Row, data: Data) -> Expected:
    """Computes everything by definition, with `W' = m (W0 + s A B) / n` materialised."""
    each = [_expected(row, data, copy) for copy in range(COPIES)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *each)


def _expected(row: Row, data: Data, copy: int) -> Expected:
    params, adapters, x = wide(data.params, copy), wide(data.adapters, copy), data.x[copy]
    parts = {name: _as_matrices(row, name, params, adapters) for name in row.kernels}
    kernels = {}
    for name, axes in row.kernels.items():
        merged = reference.merged(**parts[name], scaling=SCALING)
        order = [i for group in axes for i in group]
        shape = params[name].shape
        kernels[name] = merged.reshape([shape[i] for i in order]).transpose(np.argsort(order))

    def loss(name: str, kernel: np.ndarray) -> float:
        y = _run(row, {**params, **kernels, name: kernel}, x)
        return float(np.sum(data.weights[copy] * y))

    gradients: dict[str, Arrays] = {"exact": {}, "detached": {}}
    for name, axes in row.kernels.items():
        by_kernel = reference.differences(functools.partial(loss, name), kernels[name])
        matrix = reference.as_stack_of_matrices(by_kernel, axes)
        for kind, found in gradients.items():
            by_part = reference.gradients(
                np.eye(matrix.shape[-2]),  # for which the gradient of W' is that of the output
                **parts[name],
                scaling=SCALING,
                output_gradient=matrix,
                detached=kind == "detached",
            )
            for part in ("lora_a", "lora_b", "magnitude"):
                like = adapters[adapter_name(name, part)]
                found[adapter_name(name, part)] = getattr(by_part, part).reshape(like.shape)
    return Expected(_run(row, {**params, **kernels}, x), kernels, **gradients)


def _as_matrices(row: Row, name: str, params: Arrays, adapters: Arrays) -> Arrays:
    """Returns a kernel and its adapter with one axis each for stack, in and out."""
    axes, shape = row.kernels[name], params[name].shape
    stack, inputs, outputs = (int(np.prod([shape[i] for i in group])) for group in axes)
    shapes = {
        "lora_a": (stack, inputs, row.rank),
        "lora_b": (stack, row.rank, outputs),
        "magnitude": (stack, outputs),
    }
    matrices = {part: adapters[adapter_name(name, part)].reshape(s) for part, s in shapes.items()}
    return {"kernel": reference.as_stack_of_matrices(params[name], axes), **matrices}


def _run(row: Row, params: Arrays, x: np.ndarray) -> np.ndarray:
    assert row.layer is not None
    return row.layer(nested(params), x if row.vocab else np.asarray(x).astype(np.float64))


def wide(arrays: Arrays, copy: int) -> Arrays:
    return {name: array[copy].astype(np.float64) for name, array in arrays.items()}


def adapter_name(kernel: str, part: str) -> str:
    """Returns the dotted name of an adapter array."""
    return kernel.rpartition(".")[0] + "." * ("." in kernel) + part


def nested(arrays: Mapping[str, Any]) -> Tree:
    """Returns nested dicts of arrays by dotted name."""
    result: Tree = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        inner = result
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = array
    return result


def _get(tree: Tree, name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree


def refusal(row: Row, dtype: Any, transforms: Sequence[str] = TRANSFORMS) -> str:
    """Returns what the `LayoutError` says with which a layer is refused, or "" if it is not."""
    x = np.zeros((COPIES, *row.x), np.int32 if row.vocab else np.float32)
    xs = copies(x.astype(x.dtype if row.vocab else dtype), transforms)
    try:
        model(row, dtype, dtype, tuple(transforms)).adapt(config(row), None, xs)
    except dora.errors.LayoutError as error:
        return str(error)
    return ""


def table() -> Iterator[str]:
    """Yields the lines of the table in Markdown, as they are measured."""
    columns = [f"{d} {name.replace('_', ' ')}" for d in DTYPES for name in Errors._fields]
    yield _line("layer", "front end", "transform", *columns)
    yield "|" + "---|" * (3 + len(columns))
    worst = [0.0] * len(columns)
    for row in ROWS:
        by_dtype = [errors(row, dtype) for dtype in DTYPES.values()]
        for transform in TRANSFORMS:
            found = [value for each in by_dtype for value in each[transform]]
            worst = [max(pair) for pair in zip(worst, found, strict=True)]
            yield _line(row.name, row.front_end, transform, *(f"{x:.1e}" for x in found))
    for row in UNSUPPORTED:
        for transform in TRANSFORMS:
            for dtype in DTYPES.values():
                assert re.search(row.refused, refusal(row, dtype, [transform])), row
            yield _line(row.name, row.front_end, transform, *["refused"] * len(columns))
    yield _line("largest", "", "", *(f"{x:.1e}" for x in worst))


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
