"""Compiles a step in a process of its own, and reads what XLA says of the program.

For a TPU, XLA first optimises a program and gives each array its place in memory; then it generates
code, which takes ten times as long: 108 of 116 seconds of one core for LLaMA-7B. The plan needs the
first alone. XLA writes it down when told to (`xla_dump_to`), and then the process is ended.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.ahead_of_time import no_compilation_cache, target_mesh
from experiments.models import attention
from experiments.models.splash import visited_share
from experiments.planning.collectives import Collective, gathered_weights, read_collectives
from experiments.planning.estimate import Memory
from experiments.planning.operations import product_operations
from experiments.planning.program import PlanError, Setting, bytes_of_each_device, trace_step
from experiments.trainer.mesh import make_mesh

_PROGRAM = "*after_optimizations_after_buffer_assignment.txt"
_PLACES = "*after_optimizations-buffer-assignment.txt"
_POLL_SECONDS = 0.25

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was counted in the program of one device.

    Attributes:
        device_kind: JAX's name of the kind of device.
        operations: Floating point operations of its products, without ways that are rarely taken.
        memory: Its bytes, as XLA placed them, with those ways.
        frozen, adapters, moments: Bytes of arguments, without padding.
        trainable: Number of trained parameters, of all devices together.
        collectives: Its collectives, without those ways. None are known of a program that XLA
            refuses for its memory.
        gathered: Bytes of frozen weights that it gathers.
        attention: The implementation that was chosen, and why.
        seconds: What tracing and compiling took.
    """

    device_kind: str
    operations: float
    memory: Memory
    frozen: int
    adapters: int
    moments: int
    trainable: int
    collectives: list[Collective]
    gathered: int
    attention: str
    seconds: float


def count(setting: Setting, target: str, mesh: Mapping[str, int], progress: Progress) -> Counts:
    """Compiles a step for a target, and returns what was counted in it.

    Args:
        setting: The step.
        target: `"cpu"`, with as many devices as the mesh has, or a TPU topology (`"v5e:4x4"`).
        mesh: The size of each axis.
        progress: Is told what is being done.

    Raises:
        PlanError: The mesh does not fit the target or the model, or XLA fails.
        SystemExit: `libtpu` is not installed, or does not know the topology.
    """
    start = time.monotonic()
    facts, hlo, memory = _compiled(setting, target, dict(mesh), progress, whole=False)
    if setting.method != "lora":
        _, _, memory = _compiled(
            setting, target, dict(mesh), lambda text: progress(f"whole: {text}"), whole=True
        )
    weights = {int(n): dtype for n, dtype in facts.pop("weights").items()}
    collectives = read_collectives(hlo, mesh)
    return Counts(
        **facts,
        memory=memory,
        collectives=collectives,
        gathered=gathered_weights(collectives, weights, mesh["fsdp"]),
        seconds=time.monotonic() - start,
    )


def _compiled(
    setting: Setting, target: str, mesh: dict[str, int], progress: Progress, *, whole: bool
) -> tuple[dict[str, Any], str, Memory]:
    """Returns facts of a step, the text of its program, and its memory."""
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_compile, args=(setting, target, mesh, folder, whole))
        process.start()
        try:
            hlo, memory = _await_program(process, folder, progress)
        finally:
            process.kill()
            process.join()
        return json.loads((folder / "facts.json").read_text(encoding="utf-8")), hlo, memory


def _await_program(process: Any, folder: Path, progress: Progress) -> tuple[str, Memory]:
    """Returns the text of the program and its memory, as soon as XLA or the process wrote them."""
    progress("tracing the step")
    stages = {"facts.json": "optimising the program", _PROGRAM: "reading the program"}
    size = -1
    while True:
        alive = process.is_alive()  # asked first: what it wrote before its end is there
        for pattern in [pattern for pattern in stages if any(folder.glob(pattern))]:
            progress(stages.pop(pattern))
        if (done := folder / "program.txt").exists() and not alive:
            memory = Memory(**json.loads((folder / "memory.json").read_text(encoding="utf-8")))
            return done.read_text(encoding="utf-8"), memory
        if written := next(folder.glob(_PROGRAM), None):
            before, size = size, written.stat().st_size
            hlo = written.read_text(encoding="utf-8") if size == before else ""
            if hlo.rstrip().endswith("}"):
                return hlo, read_memory(next(folder.glob(_PLACES)).read_text(encoding="utf-8"))
        if not alive:
            error = folder / "error.txt"
            raise PlanError(
                error.read_text(encoding="utf-8")
                if error.exists()
                else f"the compiling process ended with status {process.exitcode}; its last words: "
                + (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
            )
        time.sleep(_POLL_SECONDS)


def read_memory(places: str) -> Memory:
    """Returns the bytes of a program, from XLA's list of allocations.

    Memory inside the chip ("color") does not count.
    """
    found = {"arguments": 0, "temporaries": 0, "other": 0}
    for line in re.findall(r"^allocation \d+: .*", places, re.MULTILINE):
        size = re.search(r"size (\d+)", line)
        color = re.search(r", color (\d+)", line)
        if size is None or (color is not None and color[1] != "0") or "thread-local" in line:
            continue
        kind = "arguments" if ", parameter " in line else "other"
        found["temporaries" if "preallocated-temp" in line else kind] += int(size[1])
    return Memory(**found)


def memory_refused(error: str) -> int | None:
    """Returns the bytes of temporaries for which XLA refused a program; None for another error.

    Example:
        >>> memory_refused("Ran out of memory: HLO temporaries (331.00G) exceeds (15.75G)")
        355408543744
    """
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", error)
    return int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2]))) if found else None


def _compile(
    setting: Setting, target: str, sizes: dict[str, int], folder: Path, whole: bool
) -> None:
    """Runs in the process that compiles: writes facts, and the program where it gets that far."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    for descriptor in (1, 2):  # libtpu misses a TPU in many lines
        os.dup2(log, descriptor)
    try:
        _trace_and_compile(setting, target, sizes, folder, whole)
    except (PlanError, SystemExit) as error:
        _write(folder / "error.txt", str(error))
        sys.exit(1)
    except Exception as error:
        _write(folder / "error.txt", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        sys.exit(1)


def _trace_and_compile(
    setting: Setting, target: str, sizes: dict[str, int], folder: Path, whole: bool
) -> None:
    jax.config.update("jax_platforms", "cpu")
    if target == "cpu":
        jax.config.update("jax_num_cpu_devices", _product(sizes))
    choices = _Messages()
    attention.LOG.addHandler(choices)
    attention.LOG.setLevel(logging.INFO)
    devices = list(target_mesh(target).devices.flat)
    if _product(sizes) != len(devices):
        raise PlanError(
            f"the mesh {sizes} has {_product(sizes)} devices, and {target} has {len(devices)}."
        )
    mesh = make_mesh(sizes, devices)
    step = trace_step(setting, mesh, whole=whole)
    share = visited_share(setting.tokens, setting.shape.sliding_window)
    facts = {
        "device_kind": devices[0].device_kind,
        "operations": product_operations(step.jaxpr, visited=share) / mesh.size,
        "frozen": bytes_of_each_device(step.frozen),
        "adapters": bytes_of_each_device(step.trainable),
        "moments": bytes_of_each_device(step.opt_state),
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(step.trainable)),
        "weights": step.weights(mesh),
        "attention": "; ".join(choices.texts),
    }
    _write(folder / "facts.json", json.dumps(facts))
    dump: dict[str, Any] = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    try:
        with no_compilation_cache():
            compiled = step.lowered.compile(compiler_options=None if target == "cpu" else dump)
        found = compiled.memory_analysis()
        memory = Memory(found.argument_size_in_bytes, found.temp_size_in_bytes)
        hlo = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_refused(str(error))
        if needed is None:
            raise
        kept = facts["frozen"] + facts["adapters"] + facts["moments"]
        memory, hlo = Memory(kept, needed), ""
    _write(folder / "memory.json", json.dumps(dataclasses.asdict(memory)))
    _write(folder / "program.txt", hlo)


def _product(sizes: Mapping[str, int]) -> int:
    product = 1
    for size in sizes.values():
        product *= size
    return product


def _write(path: Path, text: str) -> None:
    """Writes a file that is never seen in part."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
