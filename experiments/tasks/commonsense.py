r"""The eight commonsense tasks of the DoRA paper, in the format of LLM-Adapters (arXiv 2304.01933).

A row has an `instruction`, the `output` to be learnt, and the `answer`::

    {"instruction": "Please choose the correct answer to the question: ...\n\nAnswer1: ... Answer2:
     ...\n\nAnswer format: answer1/answer2", "input": "", "output": "the correct answer is answer2",
     "answer": "answer2"}

A row can be asked in two ways. As in the paper, the model is given the instruction and writes the
answer's number (`instruction_of`, `answer_in`). Or the texts of the answers are compared by their
likelihood, without numbers (`question_of`): a small model can do that before it can follow
instructions. Files lie as published::

    boolq / train.json, boolq / test.json, ARC - Easy / test.json, ..., commonsense_170k.json
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.tasks.rows import Row, read_rows

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class CommonsenseTask:
    """One of the tasks.

    Attributes:
        title: The name in tables.
        folder: The folder of its files.
        word: What the rows call an option: `answer1`, `solution1`, and so on.
    """

    title: str
    folder: str
    word: str


TASKS: Mapping[str, CommonsenseTask] = {
    "boolq": CommonsenseTask("BoolQ", "boolq", ""),
    "piqa": CommonsenseTask("PIQA", "piqa", "solution"),
    "siqa": CommonsenseTask("SIQA", "social_i_qa", "answer"),
    "hellaswag": CommonsenseTask("HellaSwag", "hellaswag", "ending"),
    "winogrande": CommonsenseTask("WinoGrande", "winogrande", "option"),
    "arc-e": CommonsenseTask("ARC-e", "ARC-Easy", "answer"),
    "arc-c": CommonsenseTask("ARC-c", "ARC-Challenge", "answer"),
    "obqa": CommonsenseTask("OBQA", "openbookqa", "answer"),
}
"""The tasks in the order of the paper's tables."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question whose answers are compared by their likelihood.

    Attributes:
        prompt: The text before the answer.
        options: The answers, each with the space before it.
        label: Index of the right one.
    """

    prompt: str
    options: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A text to continue.

    Attributes:
        prompt: The text before the answer.
        output: The text to be learnt.
        answer: What the text has to say to be right.
    """

    prompt: str
    output: str
    answer: str


# The prompt of Stanford Alpaca (Apache-2.0), which LLM-Adapters and the DoRA paper use.
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ANSWERS = re.compile(r"\b(?:true|false|(?:answer|solution|ending|option)[1-5])\b")


def read_task(data: Path, task: str, split: str) -> list[Row]:
    """Returns the rows of one split of a task.

    Args:
        data: The folder of the tasks' folders.
        task: A key of `TASKS`.
        split: `"train"` or `"test"`.

    Raises:
        DatasetError: The file is absent or malformed.
    """
    return read_rows(data / TASKS[task].folder / f"{split}.json")


def instruction_of(row: Row) -> Instruction:
    """Returns a row as the paper trains and tests on it.

    Raises:
        DatasetError: A field is missing, or `answer` is none of the tasks' answers.
    """
    answer = row.text("answer")
    if not _ANSWERS.fullmatch(answer):
        raise row.error(f"{answer!r} is no answer: true, false, answer1, solution1 and so on are")
    prompt = _PROMPT.format(instruction=row.text("instruction"))
    return Instruction(prompt, row.text("output"), answer)


def numbered_question_of(row: Row) -> Question:
    r"""Returns a row as a question in the paper's form, whose answers are numbers.

    Raises:
        DatasetError: A field is missing, or the instruction does not say what can be answered.

    Example:
        >>> text = "Is ice cold?\n\nAnswer format: true/false"
        >>> row = Row({"instruction": text, "output": "it is", "answer": "true"}, Path("a.json"), 1)
        >>> numbered_question_of(row).options
        ('the correct answer is true', 'the correct answer is false')
    """
    asked = instruction_of(row)
    names = _names(row)
    options = tuple(f"the correct answer is {name}" for name in names)
    return Question(asked.prompt, options, names.index(asked.answer))


def _names(row: Row) -> list[str]:
    """Returns what an instruction says can be answered."""
    _, marker, names = row.text("instruction").rpartition("Answer format:")
    known, answer = names.strip().split("/"), row.text("answer")
    if not marker or answer not in known:
        raise row.error(f"not an instruction that can be answered with {answer!r}")
    return known


def answer_in(text: str) -> str:
    """Returns the first answer that a generated text names; empty if there is none.

    Example:
        >>> answer_in("the correct answer is answer3, not answer1")
        'answer3'
    """
    found = _ANSWERS.search(text)
    return found.group() if found else ""


def question_of(row: Row, task: str) -> Question:
    r"""Returns a row as a question and the texts of its answers.

    In WinoGrande and HellaSwag an answer is what continues the sentence.

    Raises:
        DatasetError: A field is missing, or the instruction is not of the published form.

    Example:
        >>> text = "Please choose the correct answer to the question: Ice is\n\n"
        >>> text += "Answer1: warm. Answer2: cold.\n\nAnswer format: answer1/answer2"
        >>> row = Row({"instruction": text, "answer": "answer2"}, Path("test.json"), 1)
        >>> question_of(row, "arc-e")
        Question(prompt='Question: Ice is\nAnswer:', options=(' warm.', ' cold.'), label=1)
    """
    word, known = TASKS[task].word, _names(row)
    body = row.text("instruction").rpartition("Answer format:")[0]
    label = known.index(row.text("answer"))
    _, colon, asked = body.partition(": ")
    if not colon:
        raise row.error(f"not an instruction of {task}: no ': ' before the question")
    if not word:
        return Question(_asked(asked), tuple(f" {name}" for name in known), label)
    parts = re.split(rf"\s{word.capitalize()}([1-9]): ?", asked)
    if [word + number for number in parts[1::2]] != known:
        raise row.error(f"the answers in the instruction are not {'/'.join(known)}")
    asked, options = parts[0].strip(), [part.strip() for part in parts[2::2]]
    if task == "hellaswag":
        return Question(asked, tuple(f" {option}" for option in options), label)
    if task == "winogrande":
        before, blank, after = asked.partition("_")
        if not blank or not before.strip():
            raise row.error("the sentence has no blank '_', or starts with it")
        return Question(before.rstrip(), tuple(f" {o}{after}" for o in options), label)
    return Question(_asked(asked), tuple(f" {option}" for option in options), label)


def _asked(question: str) -> str:
    # In the published files, that of BoolQ stands behind a second colon.
    return f"Question: {question.removeprefix('question: ').strip()}\nAnswer:"
