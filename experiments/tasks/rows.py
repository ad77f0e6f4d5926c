"""Reads the rows of JSON files, and says in which line a row stands that is no good."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.sarcasm import DatasetError

_BETWEEN = re.compile(r"[\s,\[\]]*")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        fields: The object.
        file: The file, for messages.
        line: The line in which the object starts, from 1.
    """

    fields: dict[str, Any]
    file: Path
    line: int

    def error(self, what: str) -> DatasetError:
        """Returns an error that names the place."""
        return DatasetError(f"{self.file}, line {self.line}: {what}")

    def text(self, name: str) -> str:
        """Returns a field that has to be a text that is not empty.

        Raises:
            DatasetError: It is absent, empty, or no text.
        """
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"needs a text {name!r}, got {value!r:.80}")
        return value


def read_rows(file: Path) -> list[Row]:
    r"""Returns the objects of a file: of a JSON array, or of JSON lines.

    Raises:
        DatasetError: There is no such file, it has no rows, or a row is malformed. Says the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "rows.json"
        ...     _ = file.write_text('[\n {"answer": "4"},\n {"answer": "5"}\n]')
        ...     rows = read_rows(file)
        >>> [(row.line, row.fields["answer"]) for row in rows]
        [(2, '4'), (3, '5')]
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(f"there is no file {file}: see --data") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8: {error}") from None
    rows = list(_objects(text, file))
    if not rows:
        raise DatasetError(f"{file} has no rows")
    return rows


def _objects(text: str, file: Path) -> Iterator[Row]:
    decoder, position, line = json.JSONDecoder(), 0, 1
    while True:
        start = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        if start == len(text):
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError as error:
            raise DatasetError(f"{file}, line {line}: not a JSON object ({error})") from None
        row = Row(value, file, line)
        if not isinstance(value, dict):
            raise row.error(f"not a JSON object, but {value!r:.80}")
        yield row
        line += text.count("\n", start, end)
        position = end


def drawn(count: int, total: int, *, seed: int, first: int = 0) -> np.ndarray:
    """Returns indices of rows, drawn at random: a part of one permutation for each seed.

    Args:
        count: How many; fewer if there are not so many.
        total: Rows to draw from.
        seed: Of the permutation.
        first: Where in the permutation they start. Parts that do not overlap share no row.

    Example:
        >>> part, rest = drawn(2, 5, seed=0), drawn(9, 5, seed=0, first=2)
        >>> sorted([*part.tolist(), *rest.tolist()])
        [0, 1, 2, 3, 4]
    """
    return np.random.default_rng(seed).permutation(total)[first : first + count]
