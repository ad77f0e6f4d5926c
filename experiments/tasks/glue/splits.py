"""The splits of a GLUE experiment: rows to train on, to choose by, and to test on once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.tasks.glue.reading import Rows, read
from experiments.tasks.glue.tables import GlueTask
from experiments.tasks.sarcasm import DatasetError


@dataclass(frozen=True)
class GlueSplits:
    """The rows of an experiment.

    Attributes:
        train: Rows to train on.
        validation: Rows to choose by: one half of the published validation rows.
        test: The other half, used once.
        mismatched: MNLI's validation rows of other genres, all of them, used once like the test.
    """

    train: Rows
    validation: Rows
    test: Rows
    mismatched: Rows | None = None


def load_splits(
    task: GlueTask, data: Path, *, train_examples: int | None = None, split_seed: int = 0
) -> GlueSplits:
    """Reads a task and cuts its published validation rows in two.

    The published test labels are hidden. Choosing and testing on the same validation rows would
    report a maximum over noise. So one half chooses, and the other, of the remaining rows, is the
    test (RTE: 139 and 138 rows). For `qnli-dev` a fifth each of the validation rows chooses and
    tests, and the rest is trained on.

    Args:
        task: The task.
        data: As in `read`.
        train_examples: Number of training rows, drawn with `split_seed`. None takes all, in order.
        split_seed: Seed of the cut. It is the same for all runs of an experiment.

    Raises:
        DatasetError: See `read`; or there are fewer training rows than asked for.
    """
    published = read(task, data, "validation")
    order = np.random.default_rng(split_seed).permutation(len(published))
    if task.from_development:
        fifth = len(published) // 5
        validation, test, others = np.split(order, [fifth, 2 * fifth])
        train = published.take(others)
    else:
        validation, test = np.array_split(order, 2)  # the first is the larger one
        train = read(task, data, "train")
    if train_examples is not None:
        if train_examples > len(train):
            raise DatasetError(
                f"{task.folder} has {len(train)} rows to train on, fewer than the "
                f"{train_examples} of --train-examples"
            )
        chosen = np.random.default_rng((split_seed, 1)).permutation(len(train))[:train_examples]
        train = train.take(chosen)
    mismatched = read(task, data, "mismatched") if task.mismatched else None
    return GlueSplits(train, published.take(validation), published.take(test), mismatched)
