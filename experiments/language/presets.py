"""What each preset of the commonsense experiment trains and tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from experiments.tasks.commonsense import TASKS

Form = Literal["instruction", "text"]
Evaluation = Literal["generation", "likelihood"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings that a preset gives to those that the command line leaves open.

    Attributes:
        model: The name of the decoder in results.
        form: How rows are asked: `tasks.commonsense` has both.
        evaluation: How answers are found. None is by generation for instructions, and by likelihood
            for texts, where nothing else is possible.
        train: Keys of the tasks whose train files are used. Empty: `commonsense_170k.json`.
        test: Keys of the tasks that are tested.
        learning_rates: By rank, those that every method tries.
        choosing_seeds: Seeds of each rate, if there are several rates.
        seeds: Seeds at the chosen rate, the others included.
        epochs: Passes over the training rows.
        warmup: Steps in which the rate rises; a number below 1 is a share of all steps.
        batch_size: Rows of a step.
        max_length: Tokens of a row.
        dropout: On the input of the low-rank branch.
        train_on_prompt: Whether the loss counts the prompt's tokens.
        train_examples: Training rows, as many of each file; None takes all.
        validation_examples: Rows cut from the train files, as many of each.
        test_examples: Rows of each test file; None takes all.
        forgetting: The task, not a trained one, on whose questions forgetting is measured.
        forgetting_examples: How many of them, from its test file, without their answers.
    """

    model: str
    form: Form = "instruction"
    evaluation: Evaluation | None = None
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = tuple(TASKS)
    learning_rates: Mapping[int, tuple[float, ...]]
    choosing_seeds: int = 1
    seeds: int = 1
    epochs: float = 3.0
    warmup: float = 100
    batch_size: int = 16
    max_length: int = 256
    dropout: float = 0.05
    train_on_prompt: bool = True
    train_examples: int | None = None
    validation_examples: int = 120
    test_examples: int | None = None
    forgetting: str | None = None
    forgetting_examples: int = 100


def _of_the_paper(model: str, at_16: float, at_32: float) -> Preset:
    """DoRA, arXiv 2402.09353, tables 8 and 9: one learning rate for each rank."""
    return Preset(model=model, learning_rates={16: (at_16,), 32: (at_32,)})


_GRID = (2e-4, 6e-4, 2e-3)

PRESETS: Mapping[str, Preset] = {
    "small": Preset(
        model="SmolLM2-135M-Instruct",
        form="text",
        train=("boolq", "arc-e", "arc-c", "obqa"),
        test=tuple(task for task in TASKS if task != "hellaswag"),
        learning_rates={8: _GRID, 16: _GRID, 32: _GRID},
        seeds=3,
        epochs=1.0,
        warmup=0.1,
        batch_size=8,
        max_length=192,
        dropout=0.0,
        train_on_prompt=False,
        train_examples=240,
        validation_examples=60,
        test_examples=200,
        forgetting="siqa",
    ),
    "llama-7b": _of_the_paper("LLaMA-7B", 2e-4, 1e-4),
    "llama-13b": _of_the_paper("LLaMA-13B", 3e-4, 2e-4),
    "llama2-7b": _of_the_paper("LLaMA2-7B", 2e-4, 2e-4),
    "llama3-8b": _of_the_paper("LLaMA3-8B", 1e-4, 1e-4),
}
"""The presets by name: one for two CPU cores, and those of the paper."""

PUBLISHED_ROWS = 170_420
"""Rows of `commonsense_170k.json`."""

PUBLISHED_TEST_ROWS = 22_419
"""Rows of the eight test files, 10,042 of HellaSwag among them."""
