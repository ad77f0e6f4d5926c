"""Checkpoints of a training run: whatever it needs to go on as if it had not stopped."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dora_jax.adapters.placement import device_put_like
from dora_jax.adapters.trees import flatten, nest
from dora_jax.checkpoint.adapters import check_same_base, contents
from dora_jax.checkpoint.checks import check_settings
from dora_jax.checkpoint.fingerprint import group_records
from dora_jax.checkpoint.state import check_values, state_values, with_state_values
from dora_jax.checkpoint.storage import absolute, read, read_metadata, save_args
from dora_jax.config import DoRAConfig
from dora_jax.errors import AdapterError, CheckpointError, Path
from dora_jax.linen.model import DoRAModel
from dora_jax.model import layer_settings, with_base_records
from dora_jax.nnx.variables import DoRAParam, nnx_values, set_nnx_values

if TYPE_CHECKING:
    from os import PathLike


# What else of an NNX model changes in training: the counters of its random streams, running means.
_CHANGING = (nnx.RngState, nnx.BatchStat)


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """What a checkpoint gave back.

    Attributes:
      step: the number of steps taken.
      adapters: the NNX model, changed in place, or the adapter tree.
      state: as it was given to `restore`, with the values of the checkpoint.
      data: what `save` was given.
      model: the `DoRAModel` to go on with, if there was one.
    """

    step: int
    adapters: Any
    state: Any
    data: Any
    model: Any = None


class Checkpoints:
    """The checkpoints of one training run, in a folder, one subfolder for each step.

    They are written in the background. A checkpoint is there when it is complete: that of a process
    that was killed while writing is not taken for one, and neither is one damaged later. One run
    writes into a folder; others may read it meanwhile, as `dora_jax.load` does one of its steps.

    Args:
      folder: where; made if it is not there.
      config: of the adapters; for a Linen model its `DoRAModel`.
      keep: how many of the newest to keep.
      best: the metric, among those given to `save`, by which the best are kept too.
      mode: whether the best is the smallest or the largest.
      keep_best: how many of the best to keep.

    Example:
      >>> import tempfile, optax
      >>> import dora_jax as dora
      >>> config = dora.DoRAConfig(rank=2)
      >>> model = dora.apply_dora(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
      >>> optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=dora.DoRAParam)
      >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, config) as checkpoints:
      ...     checkpoints.save(10, model, optimizer, data={"next_example": 320})
      ...     checkpoints.wait()
      ...     restored = checkpoints.restore(model, optimizer)
      >>> restored.step, restored.data
      (10, {'next_example': 320})
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        config: DoRAConfig | DoRAModel,
        *,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
    ) -> None:
        if keep < 1 or keep_best < 1 or mode not in ("min", "max"):
            raise ValueError(
                f"keep and keep_best must be at least 1 and mode 'min' or 'max', got keep={keep}, "
                f"keep_best={keep_best}, mode={mode!r}"
            )
        self.folder = absolute(folder)
        self._config, self._best = config, best
        self._damaged: dict[int, str] = {}
        self._has_saved = False
        policies: list[Any] = [preservation_policy.LatestN(n=keep)]
        metric = None if best is None else lambda metrics: metrics[best]
        if metric is not None:
            rank = preservation_policy.BestN(
                get_metric_fn=metric, reverse=mode == "min", n=keep_best
            )
            policies.append(rank)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                best_fn=metric,  # without it the manager writes no metrics, and reads none
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps there are complete checkpoints of, in order."""
        return sorted(set(self._manager.all_steps()) - self._damaged.keys())

    def latest_step(self) -> int | None:
        """Returns the step of the newest good checkpoint, the one that `restore` takes, or None.

        It is read for that, as `restore` does.
        """
        found = self._newest(self.steps(), with_state=True)
        return None if found is None else found[0]

    def save(
        self,
        step: int,
        adapters: nnx.Module | Mapping[str, Any],
        state: Any = None,
        *,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves, in the background; what is given may change, or be donated, once this returns.

        Args:
          step: the number of steps taken; above that of every checkpoint there is.
          adapters: the adapted NNX model, whose random streams and running means are saved too, or
            the adapter tree of a Linen model.
          state: an `nnx.Optimizer`, an optimiser state, random keys: any pytree of arrays and NNX
            objects.
          data: the position in the data: a Grain iterator, its state, or any JSON.
          metrics: of this step, among them the one by which the best are kept.

        Raises:
          AdapterError: adapters are not finite (earlier checkpoints stay), the step is not above
            the newest, the metric is missing, or `data` is no JSON.
        """
        self._clean()
        if step <= (latest := max(self.steps(), default=-1)):
            raise AdapterError(
                f"{self.folder} has a checkpoint of step {latest}, so none of step {step} can be "
                "added: choose another folder, or delete the later ones"
            )
        if self._best is not None and not np.isfinite((metrics or {}).get(self._best, np.nan)):
            raise AdapterError(
                f"metrics need a finite {self._best!r}, by which the best are kept, got {metrics}"
            )
        if isinstance(adapters, nnx.Module):
            tree, metadata = contents(adapters, self._config)
        else:
            tree, metadata = contents(self._config, adapters)
        if isinstance(adapters, nnx.Module):
            tree["model"] = nest(nnx_values(adapters, _CHANGING))
        tree["state"] = nest(state_values(state))
        metadata |= {"step": step, "data": _position(data), "metrics": dict(metrics or {})}
        self._manager.save(step, args=save_args(tree, metadata), metrics=metrics)

    def restore(
        self,
        adapters: nnx.Module | Mapping[str, Any],
        state: Any = None,
        *,
        data: Any = None,
        step: int | None = None,
        allow_base_mismatch: bool = False,
    ) -> RestoredRun | None:
        """Restores the newest good checkpoint, or that of a step.

        Every array comes onto the devices, and into the sharding, of the one in its place now,
        however it was saved.

        Args:
          adapters: the adapted NNX model, changed in place, or an adapter tree of the same shapes.
          state: of the structure that was saved; NNX objects in it are changed in place. None
            leaves it out: for evaluation, or a new optimiser.
          data: an iterator with `set_state`, which is set; the position is returned in any case.
          step: which; by default the newest. If that is damaged, the one before, with a warning.
          allow_base_mismatch: restore although the base is not the one the run had.

        Returns:
          What was restored; None if there is no checkpoint yet.

        Raises:
          AdapterError: the base, names, shapes or dtypes are others than were saved; names them.
          CheckpointError: there are checkpoints and none of them is good, or not that of `step`.

        Warns:
          UserWarning: a damaged checkpoint was passed over; says why.
        """
        self.wait()
        if step is not None:
            found = self._read(step, state is not None)
        elif (newest := self._newest(self.steps(), state is not None)) is not None:
            found = newest[1]
        elif self._damaged:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints is good. "
                + "; ".join(self._damaged[number] for number in sorted(self._damaged))
            )
        else:
            return None
        return self._put(*found, adapters, state, data, allow_base_mismatch)

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, and stops writing."""
        self._manager.close()

    def _newest(
        self, steps: list[int], with_state: bool
    ) -> tuple[int, tuple[dict[Path, Any], dict[str, Any]]] | None:
        """Returns the newest good checkpoint, its step first; warns of those passed over."""
        for step in reversed(steps):
            try:
                return step, self._read(step, with_state)
            except CheckpointError as error:
                self._damaged[step] = str(error)
                warnings.warn(f"passing over a checkpoint: {error}", stacklevel=3)
        return None

    def _read(self, step: int, with_state: bool) -> tuple[dict[Path, Any], dict[str, Any]]:
        folder = self.folder / str(step)
        _, metadata = read_metadata(folder)
        return read(folder, lambda path: with_state or path[0] != "state"), metadata

    def _put(
        self,
        arrays: dict[Path, Any],
        metadata: dict[str, Any],
        adapters: Any,
        state: Any,
        data: Any,
        allow_base_mismatch: bool,
    ) -> RestoredRun:
        parts: dict[str, dict[Path, Any]] = {}
        for path, value in arrays.items():
            parts.setdefault(path[0], {})[path[1:]] = value
        is_nnx = isinstance(adapters, nnx.Module)
        model = adapters if is_nnx else self._config
        own = flatten(nest(nnx_values(adapters, DoRAParam))) if is_nnx else flatten(adapters)
        others = nnx_values(adapters, _CHANGING) if is_nnx else {}
        given_state = {} if state is None else state_values(state)
        check_values(own, parts.get("adapters", {}), "adapters")
        check_values(others, parts.get("model", {}) if is_nnx else {}, "model")
        check_values(given_state, parts.get("state", {}), "state")
        config = self._config.config if isinstance(self._config, DoRAModel) else self._config
        if isinstance(model, nnx.Module | DoRAModel):
            check_settings(config, layer_settings(model))
            base = group_records(parts.get("base", {}))
            records = check_same_base(base, model, allow_base_mismatch=allow_base_mismatch)
            model = with_base_records(model, records)
        if data is not None:
            data.set_state(metadata["data"])
        values = {
            path: device_put_like(x, own[path]) for path, x in parts.get("adapters", {}).items()
        }
        if is_nnx:
            set_nnx_values(adapters, DoRAParam, values)
            set_nnx_values(adapters, _CHANGING, parts.get("model", {}))
        return RestoredRun(
            metadata["step"],
            adapters if is_nnx else nest(values),
            with_state_values(state, parts.get("state", {})),
            metadata["data"],
            model if isinstance(model, DoRAModel) else None,
        )

    def _clean(self) -> None:
        """Removes what killed processes left; renames damaged checkpoints, to save them anew.

        Not before the first `save`: who only reads, beside a run that writes, changes nothing.
        """
        if not self._has_saved and jax.process_index() == 0:
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                unfinished.rmtree()
        self._has_saved = True
        if not self._damaged:
            return
        self._manager.wait_until_finished()
        for step in self._damaged:
            folder, number = self.folder / str(step), 0
            while (aside := self.folder / f"damaged-{step}-{number}").exists():
                number += 1
            if folder.exists() and jax.process_index() == 0:
                folder.rename(aside)
        self._damaged.clear()
        self._manager.reload()


def _position(data: Any) -> Any:
    return data.get_state() if hasattr(data, "get_state") else data
