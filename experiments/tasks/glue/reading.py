"""Reads the published files of a GLUE task: TSV, or parquet as the Hugging Face hub has it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.glue.tables import GlueTask
from experiments.tasks.sarcasm import DatasetError

HUB = Path("hub")
"""In place of a folder: the Hugging Face hub, through the package `datasets`."""

_REPOSITORY = "nyu-mll/glue"
_HIGHEST_SCORE = 5.0


@dataclass(frozen=True)
class Rows:
    """Labelled texts, or pairs of texts.

    Attributes:
        first: The texts, or the first ones of the pairs.
        second: The second texts of the pairs; None where a row is one text.
        labels: int32 classes, or float32 scores from 0 to 5.
        left_out: Rows of the file that were cut short and are left out.
    """

    first: list[str]
    second: list[str] | None
    labels: np.ndarray
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Sequence[int] | np.ndarray) -> Rows:
        """Returns some of the rows."""
        second = None if self.second is None else [self.second[i] for i in index]
        chosen = np.asarray(index, np.int64)
        return Rows([self.first[i] for i in index], second, self.labels[chosen], self.left_out)


def read(task: GlueTask, data: Path, split: str) -> Rows:
    """Reads one published split.

    A folder with `SST-2/train.tsv` and the like is read as TSV, one with `sst2/train-*.parquet` as
    parquet (this needs the package pyarrow). `hub` in place of a folder asks the Hugging Face hub
    (this needs the package datasets, and a network).

    Args:
        task: The task.
        data: The folder that holds the folders of the tasks, or `HUB`.
        split: `train`, `validation` or `mismatched`.

    Raises:
        DatasetError: The files are missing or malformed (the message has file and line), or their
            labels are hidden, or a package is missing.
    """
    if split not in ("train", "validation", "mismatched"):
        raise DatasetError(
            f"the {split} labels of GLUE are hidden: use train, validation or mismatched"
        )
    if data == HUB:
        return _of_columns(task, _from_hub(task, split), f"{_REPOSITORY}/{_hub_name(task)}")
    stem = {"train": "train", "validation": task.development, "mismatched": task.mismatched}[split]
    file = data / task.folder / f"{stem}.tsv"
    if file.is_file():
        return read_tsv(task, file)
    pattern = f"{_hub_split(task, split)}-*.parquet"
    parquet = sorted((data / _hub_name(task)).glob(pattern))
    if not parquet:
        wanted = f"{file} nor {data / _hub_name(task) / pattern}"
        raise DatasetError(
            f"there is neither {wanted}. Fetch GLUE's {task.folder}, or name another"
        )
    return read_parquet(task, parquet)


def read_tsv(task: GlueTask, file: Path) -> Rows:
    """Reads a TSV file. Quotation marks are text, and only a newline ends a row.

    Raises:
        DatasetError: A row has too few or too many fields, or another label; or the labels are
            hidden; or the file is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].count(b"\n")
        raise DatasetError(f"{file}, line {before + 1}: not UTF-8 ({error.reason})") from None
    lines = text.removesuffix("\n").split("\n")  # texts hold other line ends, such as U+2028
    header = task.header or tuple(lines[0].rstrip("\r").split("\t"))
    missing = [name for name in (*task.texts, task.label) if name not in header]
    if missing:
        hidden = "; GLUE's test files hide their labels" if missing == [task.label] else ""
        raise DatasetError(f"{file}, line 1: no column {', '.join(missing)}{hidden}")
    *of_texts, of_label = (header.index(name) for name in (*task.texts, task.label))
    columns: tuple[list[str], ...] = tuple([] for _ in of_texts)
    labels, left_out = [], 0
    for number, line in enumerate(lines, start=1):
        if number == 1 and not task.header:
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) < len(header) and left_out < task.broken_rows:
            left_out += 1
            continue
        if len(fields) != len(header):
            raise DatasetError(
                f"{file}, line {number}: {len(fields)} fields where there are {len(header)} "
                f"({', '.join(header)}). Fetch the file again"
            )
        labels.append(_label(task, fields[of_label], f"{file}, line {number}"))
        for column, index in zip(columns, of_texts, strict=True):
            column.append(fields[index].strip())
    return _rows(task, columns, labels, str(file), left_out)


def read_parquet(task: GlueTask, files: Sequence[Path]) -> Rows:
    """Reads parquet files of the hub's columns.

    Raises:
        DatasetError: pyarrow is not installed; or a file is damaged, or has other columns or
            labels.
    """
    parquet = _package("pyarrow.parquet", "parquet files", "pyarrow")
    columns: dict[str, list[Any]] = {}
    for file in files:
        try:
            table = parquet.read_table(file).to_pydict()
        except (OSError, ValueError) as error:  # pyarrow's own errors are both
            raise DatasetError(f"{file}: {str(error)[:300]}. Fetch the file again") from error
        for name, values in table.items():
            columns.setdefault(name, []).extend(values)
    return _of_columns(task, columns, str(files[0].parent))


def _from_hub(task: GlueTask, split: str) -> dict[str, list[Any]]:
    datasets = _package("datasets", "the hub", "datasets")
    try:
        loaded = datasets.load_dataset(_REPOSITORY, _hub_name(task), split=_hub_split(task, split))
    except Exception as error:  # the package raises what its many parts raise
        raise DatasetError(
            f"{_REPOSITORY}/{_hub_name(task)} cannot be had from the hub: {str(error)[:300]}. "
            "Give a folder with --data"
        ) from error
    return {name: list(loaded[name]) for name in loaded.column_names}


def _of_columns(task: GlueTask, columns: dict[str, list[Any]], source: str) -> Rows:
    names = task.hub_texts or task.texts
    missing = [name for name in (*names, "label") if name not in columns]
    if missing:
        raise DatasetError(f"{source}: no column {', '.join(missing)}")
    texts = tuple([str(x).strip() for x in columns[name]] for name in names)
    labels: list[float] = []
    for number, value in enumerate(columns["label"], start=1):
        where = f"{source}, row {number}"
        if value == -1:
            raise DatasetError(f"{where}: the label is -1: GLUE's test labels are hidden")
        if task.labels and not (isinstance(value, int) and 0 <= value < len(task.labels)):
            raise DatasetError(f"{where}: the label is {value!r}, not 0 to {len(task.labels) - 1}")
        labels.append(value if task.labels else _score(value, where))
    return _rows(task, texts, labels, source)


def _rows(
    task: GlueTask, texts: Sequence[list[str]], labels: list[float], source: str, left_out: int = 0
) -> Rows:
    if not labels:
        raise DatasetError(f"{source}: no rows")
    first, second = (*texts, None)[:2]
    assert first is not None
    return Rows(first, second, np.array(labels, np.int32 if task.labels else np.float32), left_out)


def _label(task: GlueTask, text: str, where: str) -> float:
    if not task.labels:
        return _score(text, where)
    if text not in task.labels:
        raise DatasetError(f"{where}: the label is {text!r}, not one of {', '.join(task.labels)}")
    return task.labels.index(text)


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= _HIGHEST_SCORE:
        raise DatasetError(f"{where}: the score is {value!r}, not a number from 0 to 5")
    return score


def _package(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(
            f"{what} need the package {package}: pip install {package}; or give a folder of TSV "
            f"files ({error})"
        ) from error


def _hub_name(task: GlueTask) -> str:
    return task.key.removesuffix("-dev")


def _hub_split(task: GlueTask, split: str) -> str:
    if task.mismatched and split != "train":
        return "validation_mismatched" if split == "mismatched" else "validation_matched"
    return split
