r"""Mathematical word problems: readers of published files, prompts, and answers found in a text.

- MetaMathQA (arXiv 2309.12284), one JSON array: `{"query", "response", ...}`. A response ends with
  `The answer is: 42`. What it is trained on.
- GSM8K (arXiv 2110.14168), JSON lines: `{"question", "answer"}`; an answer ends with `#### 42`.
- MATH (arXiv 2103.03874), a folder of JSON files: `{"problem", "solution", ...}`; a solution holds
  `\boxed{42}`.
- LLM-Adapters (arXiv 2304.01933), one JSON array: `{"instruction", "output", "answer"}`, with the
  answer as a number, `"42.0"`, or the letter of a choice.

The form of a row is recognised by its fields. An answer is right if it equals the published one as
a number, or otherwise as a text without white space and signs of currency (`same`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from pathlib import Path

from experiments.tasks.commonsense import Instruction
from experiments.tasks.rows import Row, read_rows

# That of PEFT's comparison of methods on MetaMathQA.
_PROMPT = "Question: {question} Think step by step.\nAnswer:"
# A comma is part of a number between digits alone: "1,000" and not "(1, 2)".
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\$?\.\d+")
_SAYS = re.compile(r"(?:the answer is|####)\s*:?", re.IGNORECASE)
_CHOICE = re.compile(r"\(?\b([A-E])\b\)?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem with its worked solution.

    Attributes:
        question: The problem.
        solution: A text that ends with the answer; empty where none was published.
        answer: What has to be found.
    """

    question: str
    solution: str
    answer: str

    @property
    def is_solved(self) -> bool:
        """Whether the solution comes to the answer, so that it can be trained on."""
        return same(final_answer(self.solution), self.answer)

    @property
    def instruction(self) -> Instruction:
        """The problem as a prompt, and the solution as what continues it."""
        prompt = _PROMPT.format(question=self.question.strip())
        return Instruction(prompt, f" {self.solution.strip()}", self.answer)


def read_problems(path: Path) -> list[Problem]:
    """Returns the problems of a file, or of the JSON files in a folder and below it.

    Raises:
        DatasetError: A file is absent or empty, or a row is malformed. Says the line.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    rows = [row for file in files or [path / "*.json"] for row in read_rows(file)]
    return [problem_of(row) for row in rows]


def problem_of(row: Row) -> Problem:
    r"""Returns a row of one of the published forms.

    Raises:
        DatasetError: It is of none of them, or holds no answer.

    Example:
        >>> row = Row({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, Path("test.jsonl"), 1)
        >>> problem_of(row)
        Problem(question='1 + 1?', solution='1 + 1 = 2\nThe answer is: 2', answer='2')
    """
    fields = row.fields
    if "query" in fields:
        solution = row.text("response")
        return Problem(row.text("query"), solution, _needed(row, final_answer(solution)))
    if "problem" in fields:
        solution = row.text("solution")
        answer = _needed(row, boxed(solution))
        return Problem(row.text("problem"), f"{solution}\nThe answer is: {answer}", answer)
    if "instruction" in fields:
        # These solutions were generated: some are empty, or come to another answer.
        solution = str(fields.get("output", "")).strip().removeprefix("A:")
        return Problem(row.text("instruction"), solution.strip(), row.text("answer"))
    work, mark, answer = row.text("answer").rpartition("####")
    if not mark:
        raise row.error("the answer has no '#### ' before its number")
    answer = answer.strip()
    # Remarks for a calculator, such as <<1+1=2>>, are no text.
    work = re.sub(r"<<[^>]*>>", "", work).strip()
    return Problem(row.text("question"), f"{work}\nThe answer is: {answer}", _needed(row, answer))


def _needed(row: Row, answer: str) -> str:
    if not answer:
        raise row.error("the solution holds no answer")
    return answer


def final_answer(text: str) -> str:
    r"""Returns the answer that a text comes to; empty if there is none.

    It is what stands in the last `\boxed{}`, or after the last `The answer is` or `####`, or else
    the last number.

    Example:
        >>> final_answer("So 2 + 40 = 42. The answer is: 42.")
        '42'
        >>> final_answer("There are 3 boxes of 4, so 12 apples")
        '12'
    """
    if found := boxed(text):
        return found
    *_, said = _SAYS.split(text)
    if said != text and said.strip():
        return said.strip().splitlines()[0].rstrip(". ")
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def boxed(text: str) -> str:
    r"""Returns what stands in the last `\boxed{}` of a text; empty if there is none.

    Example:
        >>> boxed(r"so $x = \boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position].strip()
    return ""


def same(found: str, answer: str) -> bool:
    r"""Returns whether an answer is the published one.

    Example:
        >>> same("$1,000", "1000.0"), same("(B) 12", "B"), same("0.5", r"\frac{1}{2}")
        (True, True, True)
        >>> same("", "0"), same("49 - 34 = 15 customers", "15"), same("15", "16")
        (False, True, False)
    """
    if re.fullmatch("[A-E]", answer):
        choice = _CHOICE.search(found)
        return choice is not None and choice.group(1) == answer
    one, other = (_number(text.rpartition("=")[2]) for text in (found, answer))
    if one is None or other is None:
        return bool(found) and _plain(found) == _plain(answer)
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


def _number(text: str) -> float | None:
    """Returns the number that a text is, or starts with before a unit."""
    text = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    matched = re.match(r"\s*(-?)\$?\s*(-?(?:\d[\d,]*)?(?:\.\d+)?(?:/\d+)?)(?![\w^*+(\\])", text)
    digits = (matched.group(1) + matched.group(2)).replace(",", "") if matched else ""
    try:
        return float(Fraction(digits))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return re.sub(r"[\s$]|\\[,!; ]", "", text).rstrip(".")
