"""The problems of the experiment on mathematics: its presets, its rows, and their evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from experiments.language.answering import answers
from experiments.language.answers import Encoded, encode
from experiments.language.experiment import Result, Split, joined
from experiments.language.material import end_ids, progress_line
from experiments.tasks.mathematics import Problem, final_answer, read_problems, same
from experiments.tasks.rows import drawn

if TYPE_CHECKING:
    from experiments.models.llama import Llama

TITLES = {"multiarith": "MultiArith", "svamp": "SVAMP", "gsm8k": "GSM8K", "math": "MATH"}
"""The names of the tasks in the table."""

_SEED = 0  # of the rows, the same for all runs
_GENERATED = 16  # prompts of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings that a preset gives to those that the command line leaves open.

    Attributes:
        model: The name of the decoder in results.
        train: The file to train on.
        test: By task, the file or folder of its test rows.
        target_modules: The names of the adapted layers.
        learning_rates: Those that every method tries.
        rank: Rank of the adapters.
        steps: Number of steps.
        batch_size: Rows of a step.
        max_length: Tokens of a row.
        new_tokens: Most tokens of a generated solution.
        weight_decay: Decoupled decay of all trained arrays.
        train_on_prompt: Whether the loss counts the prompt's tokens.
        most_characters: Rows with a longer question and solution are left out.
        only_solved: Whether rows are left out whose solution comes to another answer.
        train_examples: Training rows; None takes all.
        validation_examples: Rows cut from the training file.
        test_examples: Rows of each test file; None takes all.
    """

    model: str
    train: str
    test: Mapping[str, str]
    target_modules: tuple[str, ...]
    learning_rates: tuple[float, ...]
    rank: int
    steps: int
    batch_size: int
    max_length: int
    new_tokens: int
    weight_decay: float
    train_on_prompt: bool
    most_characters: int | None = None
    only_solved: bool = False
    train_examples: int | None = None
    validation_examples: int = 50
    test_examples: int | None = None


PRESETS: Mapping[str, Preset] = {
    "small": Preset(
        model="SmolLM2-135M-Instruct",
        train="math_data.json",
        test={
            "multiarith": "MultiArith/test.json",
            "svamp": "SVAMP/test.json",
            "gsm8k": "gsm8k/test.json",
        },
        target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        learning_rates=(1e-3,),
        rank=16,
        steps=100,
        batch_size=8,
        max_length=192,
        new_tokens=96,
        weight_decay=0.0,
        train_on_prompt=False,
        most_characters=500,
        only_solved=True,
        validation_examples=16,
        test_examples=50,
    ),
    "peft": Preset(
        model="Llama-3.2-3B",
        train="MetaMathQA-395K.json",
        test={"gsm8k": "gsm8k/test.jsonl", "math": "MATH/test"},
        target_modules=("q_proj", "v_proj"),
        learning_rates=(1e-4,),
        rank=32,
        steps=5000,
        batch_size=4,
        max_length=768,
        new_tokens=300,
        weight_decay=0.1,
        train_on_prompt=True,
        most_characters=1300,
    ),
}
"""The presets by name."""


@dataclasses.dataclass(frozen=True)
class MathRows:
    """The problems that the runs are trained and evaluated on.

    Attributes:
        preset: The settings.
        tokenizer: The decoder's.
        train: Encoded rows.
        splits: By split and task, the problems.
    """

    preset: Preset
    tokenizer: Tokenizer
    train: list[Encoded]
    splits: Mapping[str, Mapping[str, Sequence[Problem]]]

    def evaluate(self, model: Llama, split: Split) -> Result:
        """Generates solutions, and compares their answers with the published ones."""
        parts = []
        for task, problems in self.splits[split].items():
            with progress_line(f"{split}, {task}", len(problems)) as line:
                texts = answers(
                    model,
                    self.tokenizer,
                    [problem.instruction.prompt for problem in problems],
                    batch_size=_GENERATED,
                    max_new_tokens=self.preset.new_tokens,
                    end_ids=end_ids(self.tokenizer),
                    progress=line.update,
                )
            found = [final_answer(text) for text in texts]
            right = [
                same(one, problem.answer) for one, problem in zip(found, problems, strict=True)
            ]
            labels = [problem.answer for problem in problems]
            # An answer that is right counts as written as the published one.
            kept = [
                label if ok else one for one, label, ok in zip(found, labels, right, strict=True)
            ]
            metrics = {"accuracy": float(np.mean(right))}
            parts.append((task, metrics, np.array(kept), np.array(labels)))
        return joined(parts)

    def loss_on_unrelated(self, _: Llama) -> None:
        """Forgetting is not measured here."""


def load_rows(data: Path, preset: Preset, tokenizer: Tokenizer) -> MathRows:
    """Reads and encodes the problems of a preset; rows are drawn with one seed.

    Raises:
        DatasetError: A file is absent or malformed.
    """
    problems = read_problems(data / preset.train)
    most = preset.most_characters or np.inf
    kept = [p for p in problems if p.solution and len(f"{p.question} {p.solution}") <= most]
    if preset.only_solved:
        kept = [problem for problem in kept if problem.is_solved]
    cut = preset.validation_examples
    validation = [kept[i] for i in drawn(cut, len(kept), seed=_SEED)]
    count = len(kept) if preset.train_examples is None else preset.train_examples
    train = [kept[i].instruction for i in drawn(count, len(kept), seed=_SEED, first=cut)]
    print(
        f"{len(train):,} training rows of {len(problems):,}: the others were left out", flush=True
    )
    test = {}
    for task, name in preset.test.items():
        rows = read_problems(data / name)
        count = len(rows) if preset.test_examples is None else preset.test_examples
        test[task] = [rows[i] for i in drawn(count, len(rows), seed=_SEED)]
    encoded = encode(
        tokenizer,
        [one.prompt for one in train],
        [one.output for one in train],
        next(iter(end_ids(tokenizer)), None),
    )
    splits = {"validation": {Path(preset.train).stem: validation}, "test": test}
    return MathRows(preset, tokenizer, encoded, splits)
