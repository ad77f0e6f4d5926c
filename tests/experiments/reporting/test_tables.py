"""One table in three formats: each can be read back, and none loses what is not known."""

import csv
import io

import pytest

from experiments.reporting.statistics import Interval
from experiments.reporting.tables import Column, Table

NAN = float("nan")
TABLE = Table(
    (Column("method"), Column("F1 (%)", 1), Column("over LoRA", 2, signed=True), Column("n & m")),
    (
        ("LoRA|A_B", Interval(80.06, 79.0, 81.0), None, 1234),
        ("DoRA", Interval(81.0, NAN, NAN), 1.234, None),
    ),
    "A caption.",
)


def test_markdown_has_a_line_a_row_and_the_caption():
    assert TABLE.markdown().splitlines() == [
        "| method | F1 (%) | over LoRA | n & m |",
        "| --- | --- | --- | --- |",
        r"| LoRA\|A_B | 80.1 (79.0 to 81.0) | – | 1,234 |",
        "| DoRA | 81.0 | +1.23 | – |",
        "",
        "A caption.",
    ]


def test_csv_is_unrounded_with_a_column_for_each_end_of_an_interval():
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert rows[0] == {
        "method": "LoRA|A_B",
        "F1 (%)": "80.06",
        "F1 (%), low": "79.0",
        "F1 (%), high": "81.0",
        "over LoRA": "",
        "n & m": "1234",
    }
    assert rows[1]["F1 (%), low"] == "" and rows[1]["over LoRA"] == "1.234"


def test_latex_is_escaped():
    text = TABLE.latex()
    assert r"method & F1 (\%) & over LoRA & n \& m \\" in text
    assert r"LoRA$|$A\_B & 80.1 (79.0 to 81.0) & -- & 1,234 \\" in text


def test_records_are_json_and_empty_columns_can_go():
    assert TABLE.records()[1]["F1 (%)"] == [81.0, None, None]
    empty = Table((Column("a"), Column("b")), (("x", None), ("y", Interval(NAN, NAN, NAN))))
    assert [column.name for column in empty.without_empty_columns().columns] == ["a"]
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        Table((Column("a"), Column("b")), (("x",),))
