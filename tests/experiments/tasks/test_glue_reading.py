"""Readers of GLUE's published files: what they return, and what they say of damaged ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments.tasks.glue.reading import HUB, read, read_tsv
from experiments.tasks.glue.splits import load_splits
from experiments.tasks.glue.tables import TASKS
from experiments.tasks.sarcasm import DatasetError
from tests.experiments.tasks.glue_files import FORMATS, lines_of, write_glue

PAIRS = ("mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
# By task: the classes of the first two rows, in the hub's numbering, or their scores.
LABELS = {
    "cola": [1, 0],
    "sst2": [1, 0],
    "mrpc": [1, 0],
    "stsb": [5.0, 0.25],
    "qqp": [1, 0],
    "mnli": [2, 0],
    "qnli": [0, 1],
    "rte": [1, 0],
    "wnli": [1, 0],
}


@pytest.mark.parametrize("key", FORMATS)
def test_a_published_file_gives_its_texts_as_they_are_and_its_labels(tmp_path, key):
    write_glue(tmp_path, key)
    rows = read(TASKS[key], tmp_path, "train")
    assert len(rows) == len(rows.first) == 4
    assert rows.labels.tolist() == 2 * LABELS[key]
    assert rows.labels.dtype == (np.float32 if key == "stsb" else np.int32)
    if key in PAIRS:
        assert set(zip(rows.first, rows.second, strict=True)) == {('He said "yes', "It\u2028rains")}
    else:
        single = {"cola": 'The "boat sank.', "sst2": "it 's a \" charming film"}
        assert set(rows.first) == {single[key]}
        assert rows.second is None
    assert len(read(TASKS[key], tmp_path, "validation")) == 5


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_ends_of_either_kind_are_read(tmp_path, ending):
    file = tmp_path / "train.tsv"
    file.write_text(ending.join(lines_of("rte", 2)) + ending, encoding="utf-8", newline="")
    assert read_tsv(TASKS["rte"], file).labels.tolist() == [1, 0]


DAMAGES = {
    "a field too few": (lambda row: row.rpartition("\t")[0], "fields where there are"),
    "a field too many": (lambda row: row + "\t1", "fields where there are"),
    "another label": (lambda row: row.rpartition("\t")[0] + "\tmaybe", "'maybe'"),
    "an empty line": (lambda row: "", "1 fields where there are"),
}


@pytest.mark.parametrize("key", [key for key in FORMATS if key not in ("cola", "mrpc")])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, key, damage):
    damaged, message = DAMAGES[damage]
    lines = lines_of(key, 5)
    lines[3] = damaged(lines[3])
    file = tmp_path / "train.tsv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if key == "qqp" and damage in ("a field too few", "an empty line"):
        rows = read_tsv(TASKS[key], file)  # its published files have such rows
        assert (len(rows), rows.left_out) == (4, 1)
        return
    with pytest.raises(DatasetError, match=rf"train\.tsv, line 4: .*{message}"):
        read_tsv(TASKS[key], file)


def test_more_broken_rows_than_the_published_ones_are_no_small_matter(tmp_path):
    lines = lines_of("qqp", 60)
    lines[1:] = [line.rpartition("\t")[0] for line in lines[1:]]
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DatasetError, match="line 52: 5 fields where there are 6"):
        read_tsv(TASKS["qqp"], tmp_path / "train.tsv")


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        (
            "rte",
            "index\tsentence1\tsentence2\n0\ta\tb\n",
            "no column label; GLUE's test files hide",
        ),
        ("mrpc", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "no column Quality; GLUE's test"),
        ("cola", "index\tsentence\n0\tBill whistled.\n", "line 1: 2 fields where there are 4"),
        ("stsb", "\n".join(lines_of("stsb", 1)).replace("5.000", "5.1"), "line 2: the score is"),
        ("stsb", "\n".join(lines_of("stsb", 1)).replace("5.000", "nan"), "line 2: the score is"),
        ("stsb", "\n".join(lines_of("stsb", 1)).replace("5.000", "-1"), "line 2: the score is"),
        ("sst2", "sentence\tlabel\n", "no rows"),
        ("sst2", "text\tlabel\na\t1\n", "line 1: no column sentence$"),
        ("sst2", "", "line 1: no column sentence, label"),
    ],
)
def test_other_files_are_refused(tmp_path, key, content, message):
    file = tmp_path / "test.tsv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        read_tsv(TASKS[key], file)


def test_what_is_not_utf_8_and_what_is_not_there_is_named(tmp_path):
    own = write_glue(tmp_path, "sst2")
    (own / "train.tsv").write_bytes(b"sentence\tlabel\nok\t1\ncaf\xe9\t0\n")
    with pytest.raises(DatasetError, match=r"train\.tsv, line 3: not UTF-8"):
        read(TASKS["sst2"], tmp_path, "train")
    with pytest.raises(DatasetError, match=r"RTE.train\.tsv nor .*rte.train-\*\.parquet"):
        read(TASKS["rte"], tmp_path, "train")
    with pytest.raises(DatasetError, match="the test labels of GLUE are hidden"):
        read(TASKS["sst2"], tmp_path, "test")


# Parquet.


def write_parquet(folder, split, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    half = len(columns["label"]) // 2
    for i, part in enumerate([slice(half), slice(half, None)]):
        table = pyarrow.table({name: values[part] for name, values in columns.items()})
        parquet.write_table(table, folder / f"{split}-0000{i}-of-00002.parquet")


def test_parquet_of_the_hub_is_read_with_its_own_columns_and_numbers(tmp_path):
    columns = {"premise": ["a", "b ", "c"], "hypothesis": ["d", "e", "f"], "label": [2, 0, 1]}
    write_parquet(tmp_path / "mnli", "validation_matched", columns)
    rows = read(TASKS["mnli"], tmp_path, "validation")
    assert (rows.first, rows.second, rows.labels.tolist()) == (
        ["a", "b", "c"],
        ["d", "e", "f"],
        [2, 0, 1],
    )
    write_parquet(tmp_path / "sst2", "train", {"sentence": ["a", "b"], "label": [0, -1]})
    with pytest.raises(DatasetError, match="row 2: the label is -1: GLUE's test labels are hidden"):
        read(TASKS["sst2"], tmp_path, "train")
    write_parquet(tmp_path / "stsb", "train", {"sentence1": ["a", "b"], "label": [0.0, 1.0]})
    with pytest.raises(DatasetError, match="no column sentence2"):
        read(TASKS["stsb"], tmp_path, "train")
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DatasetError, match=r"train-0\.parquet: .*Fetch the file again"):
        read(TASKS["rte"], tmp_path, "train")


@pytest.mark.parametrize(("data", "package"), [(None, "pyarrow"), (HUB, "datasets")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, data, package):
    for name in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train-0.parquet").touch()
    with pytest.raises(DatasetError, match=f"pip install {package}"):
        read(TASKS["rte"], data or tmp_path, "train")


# Splits.


def numbered(folder, rows, *, name="dev"):
    own = folder / "RTE"
    own.mkdir(exist_ok=True)
    body = "".join(f"{i}\ttext {i}\tother {i}\tentailment\n" for i in range(rows))
    (own / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + body)


def test_the_published_validation_rows_are_cut_in_two_halves(tmp_path):
    numbered(tmp_path, 277)
    numbered(tmp_path, 40, name="train")
    splits = load_splits(TASKS["rte"], tmp_path)
    assert (len(splits.validation), len(splits.test)) == (139, 138)
    both = splits.validation.first + splits.test.first
    assert sorted(both) == sorted(f"text {i}" for i in range(277))
    assert [t.replace("text", "other") for t in both] == (
        splits.validation.second + splits.test.second
    )
    assert splits.train.first == [f"text {i}" for i in range(40)]
    again, other = (load_splits(TASKS["rte"], tmp_path, split_seed=seed) for seed in (0, 1))
    assert again.test.first == splits.test.first != other.test.first


def test_fewer_rows_to_train_on_are_a_random_part_and_the_halves_stay(tmp_path):
    numbered(tmp_path, 11)
    numbered(tmp_path, 40, name="train")
    all_rows, some = (load_splits(TASKS["rte"], tmp_path, train_examples=n) for n in (None, 20))
    assert some.test.first == all_rows.test.first
    assert len({*some.train.first} & {*all_rows.train.first}) == 20
    assert some.train.first != all_rows.train.first[:20]
    with pytest.raises(DatasetError, match="40 rows to train on, fewer than the 41"):
        load_splits(TASKS["rte"], tmp_path, train_examples=41)


def test_qnli_without_its_training_file_is_cut_from_its_validation_rows(tmp_path):
    own = write_glue(tmp_path, "qnli", validation=23)
    (own / "train.tsv").unlink()
    splits = load_splits(TASKS["qnli-dev"], tmp_path)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [15, 4, 4]
    with pytest.raises(DatasetError, match=r"QNLI.train\.tsv"):
        load_splits(TASKS["qnli"], tmp_path)


def test_mnli_has_its_mismatched_rows_whole(tmp_path):
    write_glue(tmp_path, "mnli", validation=5)
    splits = load_splits(TASKS["mnli"], tmp_path)
    assert [len(splits.validation), len(splits.test), len(splits.mismatched)] == [3, 2, 6]
