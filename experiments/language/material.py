"""The rows of the commonsense experiment, encoded; and how a decoder is evaluated on them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from experiments.language.answering import answers
from experiments.language.answers import Encoded, encode
from experiments.language.experiment import Result, Split, joined
from experiments.language.presets import Preset
from experiments.language.scoring import Options, encode_questions, score
from experiments.tasks.commonsense import (
    Question,
    answer_in,
    instruction_of,
    numbered_question_of,
    question_of,
    read_task,
)
from experiments.tasks.rows import Row, drawn, read_rows

if TYPE_CHECKING:
    from experiments.models.llama import Llama

# The rows are the same for all runs, whatever their seed.
_SEED = 0
_NEW_TOKENS = 32  # the longest answer in the paper's form has 10
_GENERATED = 16  # prompts of a batch


@dataclasses.dataclass(frozen=True)
class CommonsenseRows:
    """Everything that the runs are trained and evaluated on.

    Attributes:
        preset: Which rows, in which form.
        tokenizer: The decoder's.
        end_ids: Token ids that end a text.
        train: Encoded rows.
        splits: By split and task, the rows.
        unrelated: Texts that no run is tuned on, for forgetting; may be empty.
    """

    preset: Preset
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    train: list[Encoded]
    splits: Mapping[str, Mapping[str, Sequence[Row]]]
    unrelated: list[Options]

    def evaluate(self, model: Llama, split: Split) -> Result:
        """Evaluates a decoder with plain layers on a split, with a progress line."""
        generates = self.preset.form == "instruction" and self.preset.evaluation != "likelihood"
        evaluated = self._by_generation if generates else self._by_likelihood
        parts = []
        for task, rows in self.splits[split].items():
            with progress_line(f"{split}, {task}", len(rows)) as line:
                parts.append((task, *evaluated(model, task, rows, line)))
        return joined(parts)

    def loss_on_unrelated(self, model: Llama) -> float | None:
        """Returns nats a token of the texts that no run is tuned on; None if there are none."""
        return score(model, self.unrelated).metrics()["loss"] if self.unrelated else None

    def _by_likelihood(self, model: Llama, task: str, rows: Sequence[Row], line: Any) -> Any:
        numbered = self.preset.form == "instruction"
        questions = [numbered_question_of(r) if numbered else question_of(r, task) for r in rows]
        scores = score(model, encode_questions(self.tokenizer, questions), line.update)
        return scores.metrics(), scores.means.argmax(1), scores.labels

    def _by_generation(self, model: Llama, task: str, rows: Sequence[Row], line: Any) -> Any:
        asked = [instruction_of(row) for row in rows]
        texts = answers(
            model,
            self.tokenizer,
            [one.prompt for one in asked],
            batch_size=_GENERATED,
            max_new_tokens=_NEW_TOKENS,
            end_ids=self.end_ids,
            progress=line.update,
        )
        found, labels = np.array([*map(answer_in, texts)]), np.array([a.answer for a in asked])
        return {"accuracy": float(np.mean(found == labels))}, found, labels


@contextlib.contextmanager
def progress_line(title: str, total: int) -> Iterator[Any]:
    """Shows how many rows of an evaluation are done."""
    interval = 0.2 if sys.stderr.isatty() else 15
    with tqdm(desc=title, total=total, unit="row", mininterval=interval, leave=False) as line:
        yield line


def load_material(data: Path, preset: Preset, tokenizer: Tokenizer) -> CommonsenseRows:
    """Reads and encodes the rows of a preset.

    Rows are drawn with one seed. Validation rows are cut from the train files before the training
    rows are drawn.

    Args:
        data: The folder of the published files.
        preset: Which rows.
        tokenizer: The decoder's.

    Raises:
        DatasetError: A file is absent or malformed.
    """
    train: list[tuple[str, Row]] = []
    validation: dict[str, list[Row]] = {}
    for task in preset.train or ("commonsense_170k",):
        whole = not preset.train
        rows = read_rows(data / f"{task}.json") if whole else read_task(data, task, "train")
        cut, most = preset.validation_examples, preset.train_examples
        validation[task] = [rows[i] for i in drawn(cut, len(rows), seed=_SEED)]
        count = len(rows) if most is None else most
        train += [(task, rows[i]) for i in drawn(count, len(rows), seed=_SEED, first=cut)]
    test = {}
    for task in preset.test:
        rows = read_task(data, task, "test")
        count = len(rows) if preset.test_examples is None else preset.test_examples
        test[task] = [rows[i] for i in drawn(count, len(rows), seed=_SEED)]
    return CommonsenseRows(
        preset,
        tokenizer,
        end_ids(tokenizer),
        _encoded(tokenizer, preset, train),
        {"validation": validation, "test": test},
        _unrelated(data, preset, tokenizer),
    )


def _encoded(
    tokenizer: Tokenizer, preset: Preset, rows: Sequence[tuple[str, Row]]
) -> list[Encoded]:
    if preset.form == "text":
        questions: list[Question] = [question_of(row, task) for task, row in rows]
        right = [question.options[question.label] for question in questions]
        return encode(tokenizer, [question.prompt for question in questions], right)
    asked = [instruction_of(row) for _, row in rows]
    end = end_ids(tokenizer)
    return encode(
        tokenizer, [a.prompt for a in asked], [a.output for a in asked], end[0] if end else None
    )


def _unrelated(data: Path, preset: Preset, tokenizer: Tokenizer) -> list[Options]:
    """The questions of a task that is not trained, without their answers."""
    if preset.forgetting is None:
        return []
    rows = read_task(data, preset.forgetting, "test")
    # After those that are tested, as far as there are enough.
    first = min(preset.test_examples or 0, len(rows) - preset.forgetting_examples)
    chosen = drawn(preset.forgetting_examples, len(rows), seed=_SEED, first=max(0, first))
    questions = [question_of(rows[i], preset.forgetting) for i in chosen]
    texts = [q.prompt.removeprefix("Question: ").removesuffix("\nAnswer:") for q in questions]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return [Options((ids[0],), (tuple(ids[1:]),), 0) for ids in encoded if len(ids) > 1]


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids of the usual tokens that end a text, as far as a tokenizer has them."""
    names = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")
    found = [tokenizer.token_to_id(name) for name in names]
    return tuple(token for token in found if token is not None)
