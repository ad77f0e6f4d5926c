"""What killed and damaged writers leave in the folder of a run, cleared by the first process."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from etils import epath  # type: ignore[import-untyped]

from dora_jax.disk import remove_folder
from dora_jax.processes import failing_together, is_first


def remove_unfinished(folder: epath.Path) -> None:
    """Removes the checkpoints that were never finished.

    Only while this process writes none: its own would be taken for one of them.
    """
    if is_first():
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
            remove_folder(pathlib.Path(unfinished))


def set_aside(folder: epath.Path, steps: Iterable[int]) -> None:
    """Renames the folders of steps to `damaged-STEP-0`, or to the first number that is free."""
    with failing_together():
        for step in steps if is_first() else ():
            number = 0
            while (aside := folder / f"damaged-{step}-{number}").exists():
                number += 1
            if (damaged := folder / str(step)).exists():
                damaged.rename(aside)
