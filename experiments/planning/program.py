"""The training step of a decoder on a mesh, compiled with shapes in place of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dora_jax.decomposition import QuantizedKernel, quantized_shardings
from dora_jax.ops import cheap_ways_alone
from experiments.benchmarks.cases import Base, Case, llama
from experiments.benchmarks.steps import METHODS, make_program
from experiments.models.partitioning import resolve
from experiments.models.remat import REMAT, Remat
from experiments.planning.collectives import HLO_DTYPES

if TYPE_CHECKING:
    from experiments.models.llama_config import LlamaConfig

    Path = tuple[str, ...]
    Specs = dict[Path, PartitionSpec]


class PlanError(ValueError):
    """A step cannot be planned as it was asked for."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The step to plan.

    Attributes:
        shape: The decoder's sizes.
        method: `"dora"` or `"lora"`, in all linear layers but the head.
        tokens: Tokens of a sequence.
        rows: Sequences of each device that has a part of the batch to itself.
        rank: Rank of the adapters, which are float32.
        dtype: Dtype of the frozen weights and of the products.
        remat: What the backward pass keeps of each layer, a name in `REMAT`.
        base: Format of the kernels that are adapted; `"bf16"` leaves them in `dtype`. Embedding and
            head are in `dtype` always.
    """

    shape: LlamaConfig
    method: Literal["dora", "lora"] = "dora"
    tokens: int = 2048
    rows: int = 1
    rank: int = 32
    dtype: str = "bfloat16"
    remat: Remat = "save_scaled"
    base: Base = "bf16"

    def case(self, mesh: Mesh) -> Case:
        """Returns the model, its batch and its loss."""
        return llama(
            shape=self.shape,
            texts=self.rows * mesh.shape["data"] * mesh.shape["fsdp"],
            length=self.tokens,
            rank=self.rank,
            dtype=jnp.dtype(self.dtype),
            scan_layers=True,
            remat=REMAT[self.remat],
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """A traced step.

    Attributes:
        jaxpr: What the step computes, for all devices together.
        lowered: What is compiled for each device.
        trainable: The adapters, as `jax.ShapeDtypeStruct` with shardings.
        frozen: All other arrays of the model, likewise.
        opt_state: The optimiser's state, likewise.
    """

    jaxpr: Any
    lowered: Any
    trainable: Any
    frozen: Any
    opt_state: Any

    def weights(self, mesh: Mesh) -> dict[int, str]:
        """Returns the dtype of the frozen weights by their elements on the devices of a batch.

        Those of one layer, where layers are stacked.
        """
        found: dict[int, str] = {}
        for path, leaf in _flat(self.frozen):
            shape = leaf.get_value().shape[1:] if path[0] == "layers" else leaf.get_value().shape
            if len(shape) > 1:
                parts = mesh.shape["tensor"]
                found[math.prod(shape) // parts] = HLO_DTYPES[leaf.get_value().dtype.name]
        return found


def _step_of(setting: Setting) -> str:
    """Returns the name of a step in `METHODS`."""
    if setting.method == "lora":
        return "lora"
    # Scales are computed once, before the scan over layers. Of quantised kernels they are computed
    # in it: the product that has `x W0` has what they need, and before it XLA dequantises them all.
    return "dora-hoisted" if setting.base == "bf16" else "dora"


def trace_step(setting: Setting, mesh: Mesh, *, whole: bool) -> Step:
    """Traces a training step for the devices of a mesh, which may not be there.

    The whole program has ways that are rarely taken, too: products with columns that nearly vanish
    (`dora_jax.ops.cheap_ways_alone`). They take memory, but as a rule no time.

    Raises:
        PlanError: The mesh does not divide an array. Names it.
    """
    with jax.set_mesh(mesh), contextlib.nullcontext() if whole else cheap_ways_alone():
        case = setting.case(mesh)
        program = make_program(
            METHODS[_step_of(setting)], case.abstract(setting.base), case.adapter, case.loss
        )
        specs = parameter_specs(program.trainable, program.frozen)
        trainable, frozen, opt_state = (
            placed(tree, specs, mesh)
            for tree in (program.trainable, program.frozen, program.opt_state)
        )
        batch = {name: _batch(x, mesh) for name, x in case.batch.items()}
        out = jax.tree.map(lambda x: x.sharding, (trainable, opt_state))
        jitted = jax.jit(
            program.step,
            out_shardings=(*out, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=(0, 2),
        )
        traced = jitted.trace(trainable, frozen, opt_state, batch)
        return Step(traced.jaxpr, traced.lower(), trainable, frozen, opt_state)


def bytes_of_each_device(tree: Any) -> int:
    """Returns the bytes of the arrays of a tree on one device, without padding.

    Two codes of 4 bits are a byte, as on a TPU.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: Any) -> int:
    small = (ml_dtypes.int4, ml_dtypes.uint4)
    return 4 if dtype in small else 8 * jnp.dtype(dtype).itemsize


def parameter_specs(*states: Any) -> Specs:
    """Returns the entries of every array of an adapted model, by path.

    They are what the metadata say; adapters have those of their kernels.
    """
    leaves = {path: leaf for state in states for path, leaf in _flat(state)}
    return {path: nnx.get_partition_spec(leaf).get_value() for path, leaf in leaves.items()}


def _flat(state: Any) -> Iterator[tuple[Path, Any]]:
    for path, leaf in nnx.to_flat_state(state):
        yield tuple(map(str, path)), leaf


def placed(tree: Any, specs: Specs, mesh: Mesh) -> Any:
    """Returns a tree of arrays with shardings: each has that of the parameter its path ends in.

    The moments of an optimiser have the paths of what they are the moments of. Codes and scales of
    a quantised kernel lie as the kernel would.
    """

    def place(path: Any, leaf: Any) -> Any:
        names = tuple(str(_name(key)) for key in path if _name(key) != "value")
        ends = (names[i:] for i in range(len(names)))
        spec = next((specs[end] for end in ends if end in specs), PartitionSpec())
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise PlanError(
                f"the mesh {dict(mesh.shape)} does not divide {'.'.join(names)}, of shape "
                f"{leaf.shape}, as {spec}. Choose numbers of devices that divide it."
            ) from error
        if not _is_quantized(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(
            lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
            leaf,
            quantized_shardings(leaf, sharding),
        )

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=_is_quantized)


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedKernel)


def _name(key: Any) -> Any:
    return next((getattr(key, k) for k in ("key", "name", "idx") if hasattr(key, k)), key)


def _batch(x: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    spec = resolve(("batch", *(None,) * (x.ndim - 1)), mesh, x.shape)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
