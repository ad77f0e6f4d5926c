"""What the two presets of the GLUE experiment train, and for how long."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.models.bert_classifier import Pooling

RATES = tuple(float(f"{6.3e-3 / 10 ** (k / 4):.2g}") for k in reversed(range(12)))
"""Learning rates that every method tries: 1.1e-5 to 6.3e-3 in quarter decades.

The grid of arXiv 2602.04998. Full fine-tuning does best near its lower end, adapters higher up.
"""


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of an experiment.

    Attributes:
        model: The name of the encoder in results.
        tasks: Keys of tasks, in the order in which they are run.
        whole_grid: Tasks on which every method tries all rates. On the others it tries those next
            to the rates that were chosen on these, if there are any.
        methods: Methods, with the rank after a colon, in the order in which they are run.
        rates: The grid.
        choosing_seeds: Seeds of each rate.
        seeds: Seeds at the chosen rate, the others included.
        epochs: Passes over the training rows, by task.
        train_examples: Number of training rows, by task; all where it is not named.
        batch_size: Rows of a step.
        max_length: Tokens of a row at most.
        pooling: What the head reads.
        dropout: None is the checkpoint's own.
        warmup: Share of the steps in which the rate rises.
        decay: How it falls afterwards.
        members: Runs that are trained at once.
    """

    model: str
    tasks: tuple[str, ...]
    whole_grid: tuple[str, ...]
    methods: tuple[str, ...]
    rates: tuple[float, ...] = RATES
    choosing_seeds: int = 2
    seeds: int = 5
    epochs: dict[str, float] = dataclasses.field(default_factory=dict)
    train_examples: dict[str, int] = dataclasses.field(default_factory=dict)
    batch_size: int = 32
    max_length: int = 128
    pooling: Pooling = "mean"
    dropout: float | None = 0.0
    warmup: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"
    members: int = 3

    def rates_of(self, task: str, chosen: dict[str, float]) -> tuple[float, ...]:
        """Returns the rates that a method tries on a task.

        Args:
            task: The key of the task.
            chosen: The rates that were chosen for the method before, by task.

        Example:
            >>> PRESETS["small"].rates_of("rte", {"sst2": 1.1e-3, "mrpc": 6.3e-4})
            (0.00035, 0.00063, 0.0011, 0.002)
        """
        known = [chosen[name] for name in self.whole_grid if name in chosen]
        if task in self.whole_grid or not known:
            return self.rates
        near = {i + d for i in map(self.rates.index, known) for d in (-1, 0, 1)}
        return tuple(rate for i, rate in enumerate(self.rates) if i in near)


PRESETS = {
    "small": Preset(
        model="MiniLM",
        tasks=("sst2", "mrpc", "stsb", "cola", "rte"),
        whole_grid=("sst2", "mrpc"),
        methods=("lora:8", "dora:8", "dora:4", "full", "magnitude"),
        epochs={"sst2": 1, "mrpc": 2, "stsb": 1, "cola": 1, "rte": 2, "wnli": 2, "qnli-dev": 1},
        train_examples={"sst2": 4000},
    ),
    "paper": Preset(
        model="RoBERTa-base",
        tasks=("mnli", "qqp", "qnli", "sst2"),
        whole_grid=("mnli", "qqp", "qnli", "sst2", "cola", "mrpc", "stsb", "rte", "wnli"),
        methods=("full", "lora:8", "dora:8"),
        epochs={"cola": 10, "mrpc": 10, "stsb": 10, "rte": 10, "wnli": 10},
        pooling="cls",
        dropout=None,
        warmup=0.06,
        decay="linear",
        members=8,
    ),
}
"""The presets by name."""

EPOCHS = 3.0
"""Passes over the training rows of a task that a preset does not name."""
