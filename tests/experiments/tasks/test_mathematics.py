"""Word problems in the published formats, and the answers found in generated texts."""

from __future__ import annotations

import json

import pytest

from experiments.tasks.mathematics import Problem, final_answer, read_problems, same
from experiments.tasks.sarcasm import DatasetError

METAMATH = {
    "query": "What is 6 x 7?",
    "response": "6 x 7 = 42.\n#### 42\nThe answer is: 42",
    "type": "GSM_Rephrased",
    "original_question": "What is 6 x 7?",
}
GSM8K = {"question": "2 boxes of 6?", "answer": "2 * 6 = <<2*6=12>>12 eggs\n#### 1,012"}
MATH = {
    "problem": "Find $x$.",
    "level": "Level 1",
    "type": "Algebra",
    "solution": r"So $\boxed{1}$ is wrong, and $x = \boxed{\frac{1}{2}}$.",
}
ADAPTERS = {
    "instruction": "How many?",
    "input": "",
    "output": "\nA: 3 * 4 = 12. The answer is 12.",
    "answer": "12.0",
}
CHOICE = {"instruction": "Which? (A) 1 (B) 2", "output": "The answer is (B).", "answer": "B"}


def test_published_rows_become_problems_that_their_solutions_solve(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps([METAMATH]))
    (tmp_path / "gsm8k.jsonl").write_text("\n".join([json.dumps(GSM8K)] * 2))
    (tmp_path / "MATH" / "algebra").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "MATH" / "algebra" / f"{i}.json").write_text(json.dumps(MATH))
    (tmp_path / "adapters.json").write_text(json.dumps([ADAPTERS, CHOICE], indent=2))
    (meta,) = read_problems(tmp_path / "meta.json")
    assert meta == Problem(METAMATH["query"], METAMATH["response"], "42")
    grade_school = read_problems(tmp_path / "gsm8k.jsonl")
    expected = "2 * 6 = 12 eggs\nThe answer is: 1,012"
    assert grade_school == [Problem("2 boxes of 6?", expected, "1,012")] * 2
    competition = read_problems(tmp_path / "MATH")
    assert len(competition) == 3 and competition[0].answer == r"\frac{1}{2}"
    adapters = read_problems(tmp_path / "adapters.json")
    assert [problem.answer for problem in adapters] == ["12.0", "B"]
    assert all(p.is_solved for p in (meta, *grade_school, *competition, *adapters))
    assert meta.instruction.prompt + meta.instruction.output == (
        "Question: What is 6 x 7? Think step by step.\nAnswer: " + METAMATH["response"]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (METAMATH | {"response": "I cannot say"}, "holds no answer"),
        (METAMATH | {"query": 5}, "needs a text 'query'"),
        (GSM8K | {"answer": "12"}, "has no '#### '"),
        (GSM8K | {"answer": "12\n####  "}, "holds no answer"),
        (MATH | {"solution": "x = 1"}, "holds no answer"),
        (ADAPTERS | {"answer": None}, "needs a text 'answer'"),
        ({"text": "a"}, "needs a text 'answer'"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [GSM8K, row])))
    with pytest.raises(DatasetError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read_problems(tmp_path / "rows.jsonl")
    with pytest.raises(DatasetError, match="there is no file"):
        read_problems(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 * 7 = 42. The answer is: 42", "42"),
        ("The answer is 41. No, the answer is $1,042.50.", "$1,042.50"),
        ("7 apples.\n#### 42\n", "42"),
        (r"so \boxed{\sqrt{2}}. The answer is: 1", r"\sqrt{2}"),
        ("it is 5, or -42", "-42"),
        ("it costs .5", ".5"),
        (r"\boxed{3", "3"),
        ("no number", ""),
    ],
)
def test_the_answer_is_what_the_text_says_last(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("found", "answer", "right"),
    [
        ("42", "42.0", True),
        ("-42", "42", False),
        ("$1,042 dollars", "1042", True),
        ("42%", "42", True),
        ("3/4", "0.75", True),
        (r"\frac{3}{4}", "3/4", True),
        (r"\dfrac{1}{3}", r"\frac{1}{3}", True),
        ("1/0", "1", False),
        ("x = 5", "5", True),
        (r"5\pi", "5", False),
        (r"5\pi", r"5 \pi", True),
        ("(1, 2)", "(1,2)", True),
        ("12", "1", False),
        ("(C)", "C", True),
        ("C) 12", "D", False),
        ("Cat", "C", False),
        ("", "", False),
    ],
)
def test_answers_are_compared_as_numbers_and_otherwise_as_texts(found, answer, right):
    assert same(found, answer) == right
