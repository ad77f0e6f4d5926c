"""Rows of the commonsense tasks in the published format; the place of a malformed one is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.tasks.commonsense import (
    Question,
    answer_in,
    instruction_of,
    numbered_question_of,
    question_of,
    read_task,
)
from experiments.tasks.rows import drawn, read_rows
from experiments.tasks.sarcasm import DatasetError
from tests.experiments.commonsense_files import row, write_task

PUBLISHED = [
    (
        "boolq",
        row("boolq", "is ice cold?", ("true", "false"), 1),
        Question("Question: is ice cold?\nAnswer:", (" true", " false"), 1),
    ),
    (
        "piqa",
        row("piqa", "Cut: 1. paper", ("a saw. ", "scissors, Answer1: no"), 1),
        Question("Question: Cut: 1. paper\nAnswer:", (" a saw.", " scissors, Answer1: no"), 1),
    ),
    (
        "siqa",
        row("siqa", "Al ran. Why?", ("to win", "to be late", "for fun"), 2),
        Question("Question: Al ran. Why?\nAnswer:", (" to win", " to be late", " for fun"), 2),
    ),
    (
        "hellaswag",
        row("hellaswag", "Roof: a man sits. He", ("falls.", "eats.", "is.", "sings."), 0),
        Question("Roof: a man sits. He", (" falls.", " eats.", " is.", " sings."), 0),
    ),
    (
        "winogrande",
        row("winogrande", "The cup hit the plate, and the _ broke.", ("cup", "plate"), 1),
        Question("The cup hit the plate, and the", (" cup broke.", " plate broke."), 1),
    ),
    (
        "arc-c",
        row("arc-c", "Which?", ("a", "b", "c", "d", "e"), 4),
        Question("Question: Which?\nAnswer:", (" a", " b", " c", " d", " e"), 4),
    ),
]


@pytest.mark.parametrize(
    ("task", "published", "expected"), PUBLISHED, ids=[p[0] for p in PUBLISHED]
)
def test_a_published_row_becomes_a_prompt_and_the_texts_of_its_answers(
    tmp_path, task, published, expected
):
    write_task(tmp_path, task, "test", [published])
    (found,) = read_task(tmp_path, task, "test")
    assert question_of(found, task) == expected
    asked = instruction_of(found)
    assert published["instruction"] in asked.prompt
    assert answer_in(asked.output) == asked.answer == published["answer"]
    numbered = numbered_question_of(found)
    assert (numbered.prompt, numbered.label) == (asked.prompt, expected.label)
    assert numbered.options[numbered.label] == asked.output
    assert len(numbered.options) == len(expected.options)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the correct answer is answer3", "answer3"),
        ("answer12 no. ending4", "ending4"),
        ("untrue", ""),
        ("False", ""),
        ("it is true/false", "true"),
        ("", ""),
    ],
)
def test_the_answer_of_a_generated_text_is_the_first_that_it_names(text, answer):
    assert answer_in(text) == answer


GOOD = row("siqa", "Why?", ("a", "b", "c"), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "answer4"}, "answer4"),
        ({"answer": 2}, "needs a text 'answer'"),
        ({"instruction": ""}, "needs a text 'instruction'"),
        ({"instruction": "Why?"}, "not an instruction that can be answered with 'answer2'"),
        ({"instruction": "Why?\n\nAnswer format: answer1/answer2"}, "not an instruction of siqa"),
        ({"instruction": GOOD["instruction"].replace("Answer2", "Answer3")}, "are not answer1/"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(tmp_path, change, message):
    file = write_task(tmp_path, "siqa", "train", [GOOD, GOOD | change])
    with pytest.raises(DatasetError, match=f"train.json, line 8: .*{message}"):
        [question_of(one, "siqa") for one in read_task(tmp_path, "siqa", "train")]
    assert file.read_text().splitlines()[7] == "    {"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no rows"),
        ('[\n{"a": 1},\n{"a": }\n]', "line 3: not a JSON object"),
        ('{"a": 1}\n7', "line 2: not a JSON object, but 7"),
        ('[\n{"a": "x', "line 2: not a JSON object"),
    ],
)
def test_a_damaged_file_is_named_with_the_line(tmp_path, text, message):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DatasetError, match=f"rows.json.*{message}"):
        read_rows(file)


def test_an_absent_file_is_named():
    with pytest.raises(DatasetError, match=r"nowhere/boolq/test\.json"):
        read_task(Path("nowhere"), "boolq", "test")


def test_lines_are_counted_in_arrays_and_in_json_lines(tmp_path):
    rows = [{"text": "a\n\nb"}, {"text": "c"}, {"text": "d"}]
    array, lines = tmp_path / "array.json", tmp_path / "rows.jsonl"
    array.write_text(json.dumps(rows, indent=2))
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert [one.line for one in read_rows(array)] == [2, 5, 8]
    assert [one.line for one in read_rows(lines)] == [1, 2, 3]
    assert [one.fields for one in read_rows(array)] == rows


def test_rows_that_are_drawn_apart_share_none():
    first, second = drawn(30, 100, seed=1), drawn(70, 100, seed=1, first=30)
    assert sorted([*first, *second]) == list(range(100))
    assert not np.array_equal(first, drawn(30, 100, seed=2))
