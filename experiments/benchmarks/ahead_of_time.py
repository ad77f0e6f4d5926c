"""Compiles training steps for a TPU that is not there, and reads off what they cost.

With `libtpu` installed, XLA compiles for any TPU topology on any machine. The counts are exact: no
other work on this machine changes them. They are counts of a program, though, and no time.
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
from experiments.benchmarks.cases import LLAMA_7B, Case, llama
from experiments.benchmarks.device_runs import compiled_figures
from experiments.benchmarks.steps import METHODS, Program, make_program

if TYPE_CHECKING:
    from experiments.models.llama_config import LlamaConfig

    Row = dict[str, Any]

# The last projection of a LLaMA block: nothing else in the backward pass needs its output.
LAST_PROJECTION = "down_proj"

# Memory-space assignment moves operands into VMEM ahead of use, in slices. "bytes accessed" counts
# each slice's start as a read of the whole operand, and what is read from VMEM as if from HBM: for
# one LLaMA-7B block 12 GB (LoRA) and 17 GB (DoRA), of which 10.4 and 10.1 touch HBM. Compiled
# without, every operand is counted once.
WITHOUT_VMEM_PREFETCH = {"xla_msa_enable": False}

SHARDINGS = ("fsdp", "replicated")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compiled ahead of time.

    Attributes:
        shape: Of the decoder; the number of layers is set by the program.
        length: Tokens of a device.
        rank: Of the adapters.
        dtype: Of the frozen parameters and the products; adapters are float32.
        layers: Of the programs that scan over layers.
        microbatches: Of the programs with several.
        sharding: Of the frozen parameters: "fsdp" cuts every matrix over all devices along its
            output features, "replicated" keeps all of it on each.
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
    # Otherwise libtpu asks the metadata server of a cloud machine, and waits for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling takes no TPU, so another process that compiles is no conflict.
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
    """A program that is compiled.

    Attributes:
        method: A name in `METHODS`.
        remat: What the backward pass of a block computes again: "none", "full" for everything, or
            "policy" for everything but what `dora.save_scaled` saves.
        scan: Whether it is `Setting.layers` blocks in a scan; else it is one block.
        prefetch: Whether XLA moves operands into VMEM ahead of use, as it does unless told not to.
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
"""By name: a title, and the programs that are compiled. LoRA is in each, for the ratios."""


def measure_table(table: str, target: str, setting: Setting) -> dict[str, Any]:
    """Compiles the programs of a table for a target, and counts.

    Args:
        table: A name in `TABLES`.
        target: See `target_mesh`.
        setting: The shapes.

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
    """Counts a step over k microbatches from those over one and over two, by linearity.

    XLA's cost analysis counts the body of a loop a single time, and k unrolled copies of a block
    take minutes to compile.

    Args:
        method: A name in `METHODS`.
        case: Its batch is one microbatch.
        mesh: From `target_mesh`.
        setting: k, and the sharding.

    Returns:
        Operations and bytes of k microbatches; the memory is that of two.
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
    """Compiles a step for a mesh; returns XLA's counts per device, and seconds.

    Args:
        program: Concrete or abstract.
        batch: Cut along its leading axis.
        mesh: From `target_mesh`.
        sharding: Of the frozen parameters, one of `SHARDINGS`.
        options: Of the compiler.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    frozen_spec = _fsdp if sharding == "fsdp" else lambda leaf, mesh: everywhere

    def place(tree: Any, spec: Callable[[Any, Mesh], NamedSharding]) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec(x, mesh)), tree
        )

    # Under full fine-tuning the matrices are among the trainable ones, and so are AdamW's moments.
    trainable, frozen, opt_state = (
        place(tree, frozen_spec) for tree in (program.trainable, program.frozen, program.opt_state)
    )
    rows = place(batch, lambda x, mesh: NamedSharding(mesh, PartitionSpec("data")))
    out = jax.tree.map(lambda x: x.sharding, (trainable, opt_state))
    start = time.perf_counter()
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
    """Compiles anew what the persistent cache may hold, so that the seconds are the compiler's."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _fsdp(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Cuts matrices along their last axis, if its length allows; smaller arrays are replicated."""
    large = leaf.ndim >= 2 and leaf.size >= 2**20 and leaf.shape[-1] % mesh.size == 0
    spec = (*(None,) * (leaf.ndim - 1), "data") if large else ()
    return NamedSharding(mesh, PartitionSpec(*spec))
