"""Compiles training steps for a TPU and reports the costs that XLA counts. No TPU is needed.

With `libtpu` installed, XLA compiles for any TPU topology on any machine. The counts are exact and
independent of other work on this machine. They are operations and bytes of a program, not times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dora_jax as dora
from dora_jax.ops import cheap_ways_alone
from experiments.benchmarks.cases import LLAMA_7B, Case, llama
from experiments.benchmarks.device_runs import compiled_figures
from experiments.benchmarks.steps import METHODS, Program, make_program

if TYPE_CHECKING:
    from experiments.models.llama_config import LlamaConfig

    Row = dict[str, Any]

# The last projection of a LLaMA block: nothing else in the backward pass needs its output.
LAST_PROJECTION = "down_proj"

# XLA prefetches operands into VMEM in slices. Then "bytes accessed" counts the start of each slice
# as a read of the whole operand, and reads from VMEM like reads from HBM. For one LLaMA-7B block it
# gives 12 GB (LoRA) and 17 GB (DoRA), but only 10.4 and 10.1 GB are read from HBM or written to it.
# Without the prefetch, every operand is counted once.
WITHOUT_VMEM_PREFETCH = {"xla_msa_enable": False}

SHARDINGS = ("fsdp", "replicated")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the programs that are compiled ahead of time.

    Attributes:
        shape: Configuration of the decoder. The number of layers is that of the program.
        length: Tokens per device.
        rank: Rank of the adapters.
        dtype: Dtype of the frozen parameters and the products. Adapters are float32.
        layers: Number of layers in the programs that scan over layers.
        microbatches: Number of microbatches in the programs that have several.
        sharding: Sharding of the frozen parameters. "fsdp" divides every matrix over all devices
            along its output features, "replicated" keeps a copy on each device.
    """

    shape: LlamaConfig = LLAMA_7B
    length: int = 2048
    rank: int = 32
    dtype: str = "bfloat16"
    layers: int = 8
    microbatches: int = 8
    sharding: str = "fsdp"


def target_mesh(target: str) -> Mesh:
    """Returns a mesh over the devices of a target, one axis named "data".

    Args:
        target: `"cpu"`, or a TPU topology such as `"v5e:2x2"`, `"v6e:4x4"`, `"v5p:2x2x1"`.

    Raises:
        SystemExit: `libtpu` is not installed, or does not know the topology.
    """
    if target == "cpu":
        return Mesh(np.array(jax.devices("cpu")), ("data",))
    # Otherwise libtpu waits for the metadata server of a cloud machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling needs no TPU, so several processes may compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except Exception as error:
        raise SystemExit(
            f"cannot compile for {target!r}: {error}\nIt needs libtpu (pip install "
            "'dora-jax[tpu-compile]') and a topology that libtpu knows, such as v5e:2x2."
        ) from error
    return Mesh(np.array(topology.devices).reshape(-1), ("data",))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A program to compile.

    Attributes:
        method: A name in `METHODS`.
        remat: Activations that the backward pass of a block recomputes: "none", "full" for all, or
            "policy" for all except those that `dora.save_scaled` saves.
        scan: Whether the program scans over `Setting.layers` blocks. Otherwise it has one block.
        prefetch: Whether XLA prefetches operands into VMEM, which is its default.
        microbatched: Whether a step has `Setting.microbatches` microbatches.
    """

    method: str
    remat: str = "none"
    scan: bool = False
    prefetch: bool = True
    microbatched: bool = False


def _entries(*methods: str, **options: Any) -> dict[str, Entry]:
    return {method: Entry(method, **options) for method in methods}


TABLES: dict[str, tuple[str, dict[str, Entry]]] = {
    "no_remat": (
        "one block, all activations kept",
        _entries("lora-by-hand", "lora", "dora", "dora-detached", "dora-materialized", "full"),
    ),
    "no_remat_traffic": (
        "one block, all activations kept, compiled without VMEM prefetch",
        _entries("lora", "dora", "dora-materialized", prefetch=False),
    ),
    "remat": (
        "one block, full rematerialisation",
        _entries("lora", "dora", "dora-materialized", remat="full")
        | {"dora-policy": Entry("dora", remat="policy")},
    ),
    "scan": (
        "scan over blocks, full rematerialisation",
        _entries("lora", "dora", "dora-materialized", remat="full", scan=True)
        | {"dora-policy": Entry("dora", remat="policy", scan=True)},
    ),
    "microbatches": (
        "one block, microbatches",
        _entries("lora", "dora", "dora-hoisted", microbatched=True),
    ),
}
"""The tables by name: a title and the programs. Each has LoRA, as the base of the ratios."""


def measure_table(table: str, target: str, setting: Setting) -> dict[str, Any]:
    """Compiles the programs of a table for a target and returns their costs.

    Args:
        table: A name in `TABLES`.
        target: See `target_mesh`.
        setting: The sizes.

    Returns:
        The table by its name: `device`, `devices`, `setting`, and `rows`.
    """
    mesh = target_mesh(target)
    title, entries = TABLES[table]
    rows = {}
    for name, entry in entries.items():
        start = time.monotonic()
        rows[name] = {"title": METHODS[entry.method].title, **_measure(entry, mesh, setting)}
        if entry.remat == "policy":
            rows[name]["title"] += ", `save_scaled`"
        print(f"  {rows[name]['title']}: {time.monotonic() - start:.0f} s", flush=True)
    for row in rows.values():
        row["over_lora"] = {
            figure: row[figure] / rows["lora"][figure]
            for figure in ("flops", "bytes_accessed", "temporary_bytes")
            if row[figure] and rows["lora"][figure]
        }
    found = {
        "title": title,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "setting": {**dataclasses.asdict(setting), "shape": dataclasses.asdict(setting.shape)},
        "rows": rows,
    }
    return {table: found}


def _measure(entry: Entry, mesh: Mesh, setting: Setting) -> Row:
    policies: dict[str, Any] = {
        "none": False,
        "full": True,
        "policy": dora.save_scaled(LAST_PROJECTION),
    }
    case = llama(
        shape=dataclasses.replace(
            setting.shape, num_hidden_layers=setting.layers if entry.scan else 1
        ),
        texts=mesh.size,
        length=setting.length,
        rank=setting.rank,
        dtype=jnp.dtype(setting.dtype),
        scan_layers=entry.scan,
        remat=policies[entry.remat],
    )
    if entry.microbatched:
        return count_microbatches(entry.method, case, mesh, setting)
    program = make_program(METHODS[entry.method], case.abstract(), case.adapter, case.loss)
    on_tpu = "TPU" in mesh.devices.flat[0].device_kind
    options = WITHOUT_VMEM_PREFETCH if on_tpu and not entry.prefetch else None
    return compile_for(program, case.batch, mesh, setting.sharding, options)


def count_microbatches(method: str, case: Case, mesh: Mesh, setting: Setting) -> Row:
    """Computes the costs of a step over k microbatches from those of one and two microbatches.

    The costs are linear in k. XLA's cost analysis counts the body of a loop once, and k unrolled
    copies of a block take minutes to compile.

    Args:
        method: A name in `METHODS`.
        case: A case whose batch is one microbatch.
        mesh: From `target_mesh`.
        setting: Has k and the sharding.

    Returns:
        Operations and bytes of k microbatches. The memory is that of two.
    """
    counts = []
    for microbatches in (1, 2):
        batch = {name: np.concatenate([x] * microbatches) for name, x in case.batch.items()}
        program = make_program(
            METHODS[method],
            case.abstract(),
            case.adapter,
            case.loss,
            microbatches=microbatches,
            unroll=True,
        )
        counts.append(compile_for(program, batch, mesh, setting.sharding))
    one, two = counts
    more = setting.microbatches - 1
    return two | {
        figure: one[figure] + more * (two[figure] - one[figure])
        for figure in ("flops", "bytes_accessed")
    }


def compile_for(
    program: Program, batch: Any, mesh: Mesh, sharding: str, options: dict[str, Any] | None = None
) -> Row:
    """Compiles a step for a mesh, and returns XLA's counts per device and seconds.

    The counts are those of a step in which no column of a direction is short, which is the rule.

    Args:
        program: A program with concrete or abstract arrays.
        batch: Arrays that are divided along their leading axis.
        mesh: From `target_mesh`.
        sharding: Sharding of the frozen parameters, one of `SHARDINGS`.
        options: Compiler options.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    frozen_spec = fsdp_sharding if sharding == "fsdp" else lambda leaf, mesh: everywhere

    def place(tree: Any, spec: Callable[[Any, Mesh], NamedSharding]) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec(x, mesh)), tree
        )

    # In full fine-tuning the matrices and the moments of AdamW are trainable, so they are sharded
    # in the same way.
    trainable, frozen, opt_state = (
        place(tree, frozen_spec) for tree in (program.trainable, program.frozen, program.opt_state)
    )
    rows = place(batch, lambda x, mesh: NamedSharding(mesh, PartitionSpec("data")))
    out = jax.tree.map(lambda x: x.sharding, (trainable, opt_state))
    start = time.perf_counter()
    with cheap_ways_alone():
        lowered = jax.jit(program.step, out_shardings=(*out, everywhere)).lower(
            trainable, frozen, opt_state, rows
        )
    lower_seconds = time.perf_counter() - start
    with no_compilation_cache():
        compiled = lowered.compile(compiler_options=options)
    return compiled_figures(compiled) | {
        "trainable_parameters": program.trainable_parameters,
        "lower_seconds": lower_seconds,
        "compile_seconds": time.perf_counter() - start - lower_seconds,
    }


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Turns the persistent cache off, so that the seconds are those of the compiler."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def fsdp_sharding(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Divides large matrices along their last axis if its length allows; others are replicated."""
    large = leaf.ndim >= 2 and leaf.size >= 2**20 and leaf.shape[-1] % mesh.size == 0
    spec = (*(None,) * (leaf.ndim - 1), "data") if large else ()
    return NamedSharding(mesh, PartitionSpec(*spec))
