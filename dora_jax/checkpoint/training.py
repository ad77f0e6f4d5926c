"""The checkpoints of a training run: one folder for each step, to resume from the newest."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dora_jax.checkpoint.contents import Trained, trained
from dora_jax.checkpoint.leftovers import remove_unfinished, set_aside
from dora_jax.checkpoint.manifest import check_files, check_metrics, check_place
from dora_jax.checkpoint.position import position_to_save
from dora_jax.checkpoint.step import (
    RestoredRun,
    StoredStep,
    arrays_of,
    metric_of,
    read_step,
    restore_step,
    step_contents,
)
from dora_jax.checkpoint.storage import absolute, save_args
from dora_jax.config import DoRAConfig
from dora_jax.disk import full_disk, said_once
from dora_jax.errors import AdapterError, CheckpointError, DoRAError, Path
from dora_jax.model import carries_arrays
from dora_jax.processes import failing_together, same_everywhere, several

if TYPE_CHECKING:
    from os import PathLike

    from flax import nnx

    from dora_jax.linen import DoRAModel


class Checkpoints:
    """The checkpoints of one training run, in a folder, with a subfolder for each step.

    They are written in the background. Incomplete checkpoints, as of a process that was killed
    while writing, and damaged ones are recognised and skipped. One run writes into a folder; other
    programs may read it meanwhile, as `dora_jax.load` does with one step.

    Of a run of several processes each one calls every method, on a folder that all of them see, and
    writes what its own devices hold. A checkpoint is restored on any number of processes.

    Args:
      folder: made if it does not exist.
      config: of the adapters; for a Linen model its `DoRAModel`.
      keep: how many of the newest checkpoints to keep.
      best: a metric among those given to `save`; the best checkpoints by it are kept as well.
      mode: whether the best is the smallest or the largest.
      keep_best: how many of the best to keep.

    Example:
      >>> import tempfile, optax
      >>> from flax import nnx
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
        check_place(self.folder)
        check_files(self.folder)
        check_metrics(self.folder)
        self._config, self._best = config, best
        self._damaged: dict[int, str] = {}
        self._has_saved = False
        policies: list[Any] = [preservation_policy.LatestN(n=keep)]
        metric = None if best is None else functools.partial(metric_of, best, mode)
        if metric is not None:
            best_n = preservation_policy.BestN
            policies.append(best_n(get_metric_fn=metric, reverse=mode == "min", n=keep_best))
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(said_once())
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
        # XLA's errors: another process may be lost, and the end of a checkpoint waits for all.
        of_xla = isinstance(error, RuntimeError | ValueError) and not isinstance(error, DoRAError)
        if several() and of_xla:
            return
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, in order."""
        return sorted(set(self._manager.all_steps()) - self._damaged.keys())

    def latest_step(self) -> int | None:
        """Returns the step of the newest good checkpoint, or None; `restore` takes that one.

        The checkpoint is read in full, to know that it is good.
        """
        found = self._read_newest({}, with_state=True)
        return None if found is None else found.metadata["step"]

    def save(
        self,
        step: int,
        adapters: nnx.Module | Mapping[str, Any],
        state: Any = None,
        *,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a step in the background; the arrays may be changed or donated after this returns.

        Args:
          step: the number of steps taken; above that of every checkpoint in the folder.
          adapters: the adapted NNX model, whose random streams and running means are saved too, or
            the adapter tree of a Linen model.
          state: an `nnx.Optimizer`, an optimiser state, random keys: any pytree of arrays and NNX
            objects.
          data: the position in the data: a Grain iterator, its state, or any JSON.
          metrics: of this step; with `best`, that metric must be among them.

        Raises:
          AdapterError: adapters are not finite (earlier checkpoints stay), the step is not above
            the newest, the metric is missing, or `data` is no JSON.
          CheckpointError: the disk is full, for this checkpoint or the one before, which is written
            in the background; earlier ones stay.
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
        tree, metadata = step_contents(self._trained(adapters), state)
        metadata |= {"step": step, **position_to_save(data), "metrics": dict(metrics or {})}
        args = save_args(tree, metadata)
        with self._writing():
            self._manager.save(step, args=args, metrics=metrics)

    def restore(
        self,
        adapters: nnx.Module | Mapping[str, Any],
        state: Any = None,
        *,
        data: Any = None,
        step: int | None = None,
        allow_base_mismatch: bool = False,
    ) -> RestoredRun | None:
        """Restores the newest good checkpoint, or that of one step.

        Every array takes the devices and the sharding of the array that it replaces, whatever
        those of the saved one were.

        Args:
          adapters: the adapted NNX model, changed in place, or an adapter tree of the same shapes.
          state: of the structure that was saved; NNX objects in it are changed in place. None
            leaves it out: for evaluation, or a new optimiser.
          data: an iterator with `set_state`, which is called. The position is returned in any case.
          step: the step to restore. By default the newest; if that one is damaged, the one before,
            with a warning.
          allow_base_mismatch: restore although the base is not the one that the run had.

        Returns:
          The restored run; None if there is no checkpoint yet.

        Raises:
          AdapterError: the base, names, shapes or dtypes differ from those saved; names them.
          CheckpointError: no checkpoint is good, or that of `step` is not.

        Warns:
          UserWarning: a damaged checkpoint was skipped; names the damage.
        """
        self.wait()
        run = self._trained(adapters)
        likes = arrays_of(run, state)
        if step is not None:
            stored = self._read(step, likes, with_state=state is not None)
        elif (newest := self._read_newest(likes, with_state=state is not None)) is not None:
            stored = newest
        elif self._damaged:
            raise CheckpointError(
                f"{self.folder}: none of the checkpoints is good. "
                + "; ".join(self._damaged[number] for number in sorted(self._damaged))
            )
        else:
            return None
        return restore_step(stored, run, state, data, allow_base_mismatch=allow_base_mismatch)

    def wait(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
          CheckpointError: the disk is full; the checkpoints written before stay.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all checkpoints are written, and stops the writer; errors as for `wait`."""
        with self._quiet, self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of a full disk into one, and removes what was written so far."""
        try:
            yield
        except Exception as error:
            if (full := full_disk(self.folder, error)) is None:
                raise
            remove_unfinished(self.folder)
            raise full from None

    def _trained(self, adapters: Any) -> Trained:
        if carries_arrays(adapters):
            return trained(adapters, self._config)
        return trained(self._config, adapters)

    def _read_newest(self, likes: Mapping[Path, Any], *, with_state: bool) -> StoredStep | None:
        """Returns the newest good checkpoint; warns of each damaged one that it skips."""
        for step in reversed(json.loads(same_everywhere(json.dumps(self.steps())))):
            try:
                return self._read(step, likes, with_state=with_state)
            except CheckpointError as error:
                self._damaged[step] = str(error)
                warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=3)
        return None

    def _read(self, step: int, likes: Mapping[Path, Any], *, with_state: bool) -> StoredStep:
        """Reads a checkpoint; in all processes, if it is good in all."""
        with failing_together():
            return read_step(self.folder / str(step), with_state=with_state, likes=likes)

    def _clean(self) -> None:
        """Removes what killed writers left, and renames damaged checkpoints.

            4/  6.orbax-checkpoint-tmp-1/  8/ (damaged)  ->  4/  damaged-8-0/

        Step 8 can then be saved anew. Only a writer cleans up, at its first `save`; a concurrent
        reader must not modify the folder.
        """
        if not self._has_saved:
            remove_unfinished(self.folder)
        self._has_saved = True
        if not self._damaged:
            return
        self._manager.wait_until_finished()
        set_aside(self.folder, self._damaged)
        self._damaged.clear()
        self._manager.reload()
