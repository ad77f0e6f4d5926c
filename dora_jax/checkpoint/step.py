"""One step of a training run: the arrays and metadata of its checkpoint, saved and restored."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import boxed_like, flatten, nest
from dora_jax.checkpoint.checks import check_settings, check_values
from dora_jax.checkpoint.contents import Trained, contents
from dora_jax.checkpoint.fingerprint import check_same_base, group_records
from dora_jax.checkpoint.position import restored_position
from dora_jax.checkpoint.state import state_values, with_state_values
from dora_jax.checkpoint.statistics import check_statistics_given
from dora_jax.checkpoint.storage import read, read_metadata
from dora_jax.errors import CheckpointError, Path
from dora_jax.model import (
    STATISTICS,
    STREAMS,
    base_records,
    carries_arrays,
    layer_settings,
    mutable_arrays,
    set_mutable_arrays,
    with_adapter_arrays,
    with_base_records,
)
from dora_jax.validation import is_number

_PARTS = {"adapters", "base", "statistics", "model", "state"}
# The parts of a checkpoint that hold what calls of an NNX model change.
_MUTABLE: Mapping[str, Any] = {"statistics": STATISTICS, "model": STREAMS}


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """A training run as its checkpoint had it.

    Attributes:
      step: the number of steps taken.
      adapters: the NNX model, changed in place, or the adapter tree.
      state: as it was given to `restore`, with the values of the checkpoint.
      data: the position in the data, as it was given to `save`. Where each process had its own,
        that of this one, or a list of all if there are now more or fewer processes.
      model: the `DoRAModel` to train on with, if the run has one.
    """

    step: int
    adapters: Any
    state: Any
    data: Any
    model: Any = None


class StoredStep(NamedTuple):
    """A checkpoint as it is on disk.

    Attributes:
      parts: its arrays by path, in the parts `adapters`, `base`, `statistics`, `model` and `state`.
      metadata: the step, the position in the data, the configuration.
    """

    parts: Mapping[str, Mapping[Path, Any]]
    metadata: Mapping[str, Any]

    def part(self, name: str) -> Mapping[Path, Any]:
        """Returns the arrays of a part by path; none if it was not saved, or not read."""
        return self.parts.get(name, {})


def step_contents(run: Trained, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays and the metadata to save for a step.

        {"adapters": ..., "base": norms and first rows, "statistics": running means,
         "model": random streams, "state": ...}

    Raises:
      AdapterError: see `dora_jax.save`.
    """
    tree, metadata = contents(run)
    values = state_values(state)
    check_statistics_given(run.model, values, "put batch_stats into the state")
    tree["model"] = nest(mutable_arrays(run.model, STREAMS))
    tree["state"] = nest(values)
    return tree, metadata


def arrays_of(run: Trained, state: Any) -> dict[Path, Any]:
    """Returns the arrays of a run by the paths that a checkpoint has for them."""
    values = {("adapters", *path): x for path, x in flatten(run.adapters).items()}
    values |= {("state", *path): x for path, x in state_values(state).items()}
    for path, record in {} if run.model is None else base_records(run.model).items():
        values |= {("base", *path, name): x for name, x in record.arrays().items()}
    return values


def read_step(
    folder: Any, *, with_state: bool, likes: Mapping[Path, Any] | None = None
) -> StoredStep:
    """Reads the checkpoint in a folder.

    Args:
      folder: of one step.
      with_state: whether to read the part `state` too.
      likes: the arrays of the run, see `arrays_of`; those that span processes are read in parts.

    Raises:
      CheckpointError: it is damaged or incomplete; names the file or array.
    """
    _, metadata = read_metadata(folder)
    parts: dict[str, dict[Path, Any]] = {}

    def wanted(path: Path) -> bool:
        return with_state or path[0] != "state"

    for path, value in read(folder, wanted, likes).items():
        parts.setdefault(path[0], {})[path[1:]] = value
    _check_step(folder, metadata, parts)
    return StoredStep(parts, metadata)


def _check_step(
    folder: Any, metadata: Mapping[str, Any], parts: Mapping[str, Mapping[Path, Any]]
) -> None:
    """Raises `CheckpointError` unless metadata and arrays are those of a step, and of this one."""
    own, name = metadata.get("step"), os.path.basename(folder)
    if "data" not in metadata or type(own) is not int or (name.isdecimal() and own != int(name)):
        raise CheckpointError(f"{folder} is not the checkpoint of a step: its metadata has {own!r}")
    if unknown := sorted(parts.keys() - _PARTS):
        raise CheckpointError(f"{folder} holds {unknown[0]!r}, which no step has")
    try:
        group_records(parts.get("base", {}))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def restore_step(
    stored: StoredStep, run: Trained, state: Any, data: Any, *, allow_base_mismatch: bool
) -> RestoredRun:
    """Puts a checkpoint into a run; arguments are those of `Checkpoints.restore`.

    Raises:
      AdapterError: the checkpoint is of another model, base or optimiser; names the arrays.
    """
    model, own = run.model, flatten(run.adapters)
    check_values(own, stored.part("adapters"), "adapters")
    if carries_arrays(model):
        for part, kind in _MUTABLE.items():
            check_values(mutable_arrays(model, kind), stored.part(part), part)
    check_values(state_values(state), stored.part("state"), "state")
    if model is not None:
        check_settings(run.config, layer_settings(model))
        base = group_records(stored.part("base"))
        records = check_same_base(base, model, allow_base_mismatch=allow_base_mismatch)
        model = with_base_records(model, records)
    position = restored_position(stored.metadata, data)
    if carries_arrays(model):
        adapters = with_adapter_arrays(model, run.adapters, stored.part("adapters"))
        for part, kind in _MUTABLE.items():
            set_mutable_arrays(model, kind, stored.part(part))
        model = None
    else:
        placed = {p: device_put_like(x, own[p]) for p, x in stored.part("adapters").items()}
        adapters = boxed_like(nest(placed), run.adapters)
    return RestoredRun(
        stored.metadata["step"],
        adapters,
        with_state_values(state, stored.part("state")),
        position,
        model,
    )


def metric_of(name: str, mode: str, metrics: Any) -> float:
    """Returns a step's metric; the worst one if its file does not hold it."""
    value: Any = metrics.get(name) if isinstance(metrics, Mapping) else None
    worst = math.inf if mode == "min" else -math.inf
    return float(value) if is_number(value) else worst
