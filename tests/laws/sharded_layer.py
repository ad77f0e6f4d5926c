"""One layer on four virtual devices, against DoRA in float64 NumPy.

`python -m tests.laws.sharded_layer` prints, as JSON, the errors of the output and of each gradient
under automatic axes, explicit axes and `shard_map`, the kernel cut on its in and its out axis.
"""

from __future__ import annotations

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import dora_jax as dora
from dora_jax.decomposition import KernelAxes, dense, layer_entries, quantized_shardings
from tests.support import reference

CONFIG = dora.DoRAConfig(rank=2, alpha=4.0)
AXES = KernelAxes((), (0,), (1,))
CUT = P("fsdp", "tensor")
ADAPTER = ("lora_a", "lora_b", "magnitude")
SHAPES = {"kernel": (8, 12), "lora_a": (8, 2), "lora_b": (2, 12), "magnitude": (12,)}


def draw():
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    arrays |= {"x": rng.normal(size=(4, 8)), "dy": rng.normal(size=(4, 12))}
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2)


def result(run, given):
    """Returns the output, and the gradients of `<dy, y>`, of `run(adapters, x, dy)`."""
    own = {name: given[name] for name in ADAPTER}
    (_, y), gradients = run(own, given["x"], given["dy"])
    return {"output": y, **gradients}


def expected(given):
    """Returns the same from NumPy in float64."""
    arrays = (given["kernel"], *(given[name] for name in ADAPTER), 2.0)
    gradients = reference.gradients(given["x"], *arrays, given["dy"], detached=False)._asdict()
    output = given["x"].astype(np.float64) @ reference.merged(*arrays)
    return {"output": output, **{name: gradients[name] for name in ADAPTER}}


def errors(found, wanted):
    return {name: reference.relative_error(found[name], x) for name, x in wanted.items()}


def shrunk(given):
    """The same with a kernel of which the adapter leaves a thousandth of one column."""
    kernel = given["kernel"].copy()
    kernel[:, 3] = -2.0 * 1.001 * given["lora_a"] @ given["lora_b"][:, 3]
    return given | {"kernel": kernel}


def quantised(given, format):
    """The same with a quantised kernel, a block of two rows where it has blocks."""
    base = nnx.Linear(8, 12, use_bias=False, rngs=nnx.Rngs(0))
    base.kernel.set_value(jnp.asarray(given["kernel"]))
    block = {"nf4": 2}.get(format)
    base = dora.quantize(base, dora.Quantization(format, block, double=block is not None))
    return given | {"kernel": base.kernel.get_value()}


def dequantised(given):
    return given | {"kernel": np.asarray(dense(given["kernel"]))}


def placed(kernel, sharding):
    if isinstance(kernel, np.ndarray):
        return jax.device_put(kernel, sharding)
    return jax.device_put(kernel, quantized_shardings(kernel, sharding))


def on_a_mesh(kind, draws):
    """Runs a layer made and trained on a mesh, with all else left to `apply_dora`."""
    mesh = mesh_of(kind)
    explicit = kind is AxisType.Explicit

    @nnx.jit
    def step(model, x, dy):
        def loss(model):
            y = model(x, out_sharding=CUT if explicit else None)
            return jnp.sum(dy * y), y

        wrt = nnx.DiffState(0, dora.DoRAParam)
        return nnx.value_and_grad(loss, argnums=wrt, has_aux=True)(model)

    def run(given):
        base = nnx.Linear(8, 12, use_bias=False, rngs=nnx.Rngs(0))
        base.kernel.set_value(placed(given["kernel"], NamedSharding(mesh, CUT)))
        model = dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1))

        def of_adapters(adapters, x, dy):
            dora.set_adapters(model, jax.device_put(adapters, dora.shardings(model)))
            x = jax.device_put(x, NamedSharding(mesh, P("fsdp", None)))
            result, gradients = step(model, x, jax.device_put(dy, NamedSharding(mesh, CUT)))
            return result, nnx.to_pure_dict(gradients)

        return of_adapters

    with jax.set_mesh(mesh):
        return [result(run(given), given) for given in draws]


def in_shard_map(given, check_vma=True):
    """Every device has its part of the kernel, and sums its part of the product."""
    mesh = mesh_of(AxisType.Auto)
    base = nnx.Linear(8, 12, use_bias=False, rngs=nnx.Rngs(0))
    base.kernel.set_value(jnp.asarray(given["kernel"]))
    model = dora.apply_dora(base, CONFIG, rngs=nnx.Rngs(1))
    graphdef, adapters, kept, rest = nnx.split(
        model, dora.DoRAParam, nnx.Any(dora.nnx.BaseParam, nnx.Param), ...
    )
    entries = {"kernel": tuple(CUT)} | layer_entries(AXES, CUT)
    specs = [
        jax.tree_util.tree_map_with_path(
            lambda path, _: P(*entries[path[0].key.removeprefix("base_")]), state
        )
        for state in (adapters, kept)
    ]

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(*specs, P(None, "fsdp")),
        out_specs=P(None, "tensor"),
        check_vma=check_vma,
    )
    def apply(adapters, kept, x):
        y = nnx.merge(graphdef, adapters, kept, rest, copy=True)(x)
        return jax.lax.psum(y, "fsdp")

    @jax.jit
    def step(own, x, dy):
        def loss(own):
            state = jax.tree.map(lambda leaf: leaf, adapters)
            nnx.replace_by_pure_dict(state, own)
            y = apply(state, kept, x)
            return jnp.sum(dy * y), y

        return jax.value_and_grad(loss, has_aux=True)(own)

    return errors(result(step, given), expected(given))


def refusal(given):
    """What is said where types do not tell how the kernel is cut."""
    try:
        in_shard_map(given, check_vma=False)
    except dora.DoRAError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    arrays = draw()
    of_column = shrunk(arrays)
    automatic, short = on_a_mesh(AxisType.Auto, [arrays, of_column])
    explicit, also_short = on_a_mesh(AxisType.Explicit, [arrays, of_column])
    codes = {format: quantised(arrays, format) for format in ("nf4", "int8")}
    of_codes = on_a_mesh(AxisType.Auto, codes.values())
    report = {
        "automatic": errors(automatic, expected(arrays)),
        "explicit": errors(explicit, expected(arrays)),
        "a short column, explicit": errors(also_short, short),
        "shard_map": in_shard_map(arrays),
        "refusal": refusal(arrays),
    }
    for (format, given), found in zip(codes.items(), of_codes, strict=True):
        report[format] = errors(found, expected(dequantised(given)))
    print(json.dumps(report))
