"""`python -m tests.processes.public FRONT_END FOLDER`: what is public, on arrays cut in four.

Leaves in FOLDER what is saved, in values.npz what is computed, in texts-PROCESS texts and errors.
All of it is to be the same in a run of one process and in one of several.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import dora_jax as dora
from dora_jax import huggingface, names
from dora_jax.adapters import diff, flatten
from dora_jax.adapters.trees import nest
from dora_jax.checkpoint import read_adapters
from dora_jax.decomposition import KernelAxes
from dora_jax.processes import on_first_host, spans_processes
from experiments.trainer import distributed
from tests.processes.runs import RUNS, batch, cut, mesh_of
from tests.support.models import random_adapters

MODULES = names.NameMap({"layer_0": "up.c_fc", "layer_1": "down.c_proj"})


def main(front_end: str, folder: str) -> None:
    mesh = mesh_of("fsdp=2,tensor=2")
    run = RUNS[front_end](mesh)
    ones = {path: np.ones(x.shape, x.dtype) for path, x in flatten(run.adapters).items()}
    trained = cut(random_adapters(nest(ones)), mesh)
    apart = diff(run.adapters, trained)
    run.adapters = trained

    run.check_base()
    merged = run.merged()
    run.save(f"{folder}/adapter")
    check_own_parts(f"{folder}/adapter", run.adapters)
    run.to_peft(f"{folder}/peft", MODULES)
    huggingface.save_checkpoint(f"{folder}/merged", merged, MODULES)
    kernel = merged["layer_0"]["kernel"]
    values = {
        "merged": merged,
        "scales": run.scales(),
        "disabled": run.disabled(),
        "loaded": run.load(f"{folder}/adapter"),
        "from_peft": run.from_peft(f"{folder}/peft", MODULES),
        "change": dora.weight_change(kernel, 2 * kernel, KernelAxes((), (0,), (1,)))._asdict(),
        "apart": {name: np.float32(x) for name, x in apart.items()},
    }
    assert not any(diff(trained, values["loaded"]).values())
    host = {".".join(path): on_first_host(x) for path, x in flatten(values).items()}
    if jax.process_index() == 0:
        np.savez(f"{folder}/values.npz", **host)
    say(run.summary())

    say_error("it exists", lambda: run.save(f"{folder}/adapter"))
    run.save(f"{folder}/adapter", overwrite=True)
    if front_end == "linen" and jax.process_count() > 1:
        x = batch(mesh)[0]
        variables = {"params": run.params, "dora": trained}
        say_error("closed over", lambda: jax.jit(run.model.apply)(variables, x))
    run.adapters = jax.tree.map(lambda x: x / 0, trained)
    say_error("not finite", lambda: run.save(f"{folder}/infinite"))
    run.double_the_base()
    say_error("changed base", run.check_base)
    say_error("another base", lambda: run.load(f"{folder}/adapter"))


def check_own_parts(folder: str, adapters: dict[str, Any]) -> None:
    """What is cut over the processes is read so: no process holds the whole."""
    likes = flatten(adapters)
    read = flatten(read_adapters(folder, likes).adapters)
    assert read.keys() == likes.keys()
    for path, x in read.items():
        assert spans_processes(x) == spans_processes(likes[path]), path
    assert any(map(spans_processes, read.values())) == (jax.process_count() > 1)


def say(text: str) -> None:
    # What Gloo prints comes in between.
    with open(f"{sys.argv[2]}/texts-{jax.process_index()}", "a", encoding="utf-8") as file:
        print(text, file=file)


def say_error(name: str, function: Callable[[], object]) -> None:
    """Says the library's error that a function raises, which is to raise one."""
    try:
        function()
    except dora.DoRAError as error:
        say(f"{name}: {type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{name}: no error")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with distributed.start("Start it again."):
        main(*sys.argv[1:3])
