"""Headlines labelled for sarcasm: reads them, removes duplicates and splits them.

The file holds 28,614 headlines of a satirical and of an ordinary news site, 28,498 distinct.
Source: Misra and Arora, "Sarcasm detection using news headlines dataset", AI Open 4 (2023), in the
form of chat samples. The data set has no split. The split made here is specific to this project.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CLASS_NAMES = ("not sarcastic", "sarcastic")


class DatasetError(ValueError):
    """A data file is malformed, or has too few texts for the requested split."""


@dataclass(frozen=True)
class Split:
    """Texts with their labels: `labels[i]`, int32, indexes `CLASS_NAMES` for `texts[i]`."""

    texts: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def majority_accuracy(self) -> float:
        """Returns the accuracy of always answering the most frequent label."""
        return float(np.bincount(self.labels).max() / len(self.labels))


@dataclass(frozen=True)
class Splits:
    """Three disjoint splits, and the number of rows that were left out.

    Attributes:
        class_names: The name of each label.
        rows: Rows in the file.
        duplicates: Rows left out because an earlier row has the same text and label.
        conflicts: Rows left out because their text occurs with both labels.
    """

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    rows: int
    duplicates: int
    conflicts: int


def load_sarcasm(
    path: Path, *, train: int = 4000, validation: int = 500, test: int = 2000, seed: int = 0
) -> Splits:
    r"""Reads the samples and splits them at random. No text is in two splits.

    Texts that differ only in case or white space count as the same. A text that occurs with both
    labels is left out. The splits are consecutive parts of one seeded permutation, so other sizes
    give another test split. To compare training sizes, train on the first part of one training
    split.

    Args:
        path: JSON lines of the form `{"input": [chat turns], "ideal": "0" or "1"}`. The text is
            the `content` of the last turn.
        train: Number of training texts.
        validation: Number of validation texts.
        test: Number of test texts.
        seed: Seed of the permutation.

    Raises:
        DatasetError: A line is malformed (the message has its number), or there are too few
            distinct texts.

    Example:
        >>> import tempfile
        >>> def sample(text, label):
        ...     return json.dumps({"input": [{"role": "user", "content": text}], "ideal": label})
        >>> rows = [sample(f"headline {i}", str(i % 2)) for i in range(6)]
        >>> rows.append(sample("Headline 0", "0"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "samples.jsonl"
        ...     _ = file.write_text("\n".join(rows))
        ...     splits = load_sarcasm(file, train=3, validation=1, test=2)
        >>> len(splits.train), len(splits.test), splits.duplicates
        (3, 2, 1)
    """
    texts, labels = _read(path)
    kept, conflicts = _distinct(texts, labels)
    sizes = {"train": train, "validation": validation, "test": test}
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(kept):
        raise DatasetError(
            f"{path} has {len(kept)} distinct texts, which cannot be split into {sizes}: "
            "every split needs at least 1 text, and together at most as many as there are."
        )
    order = np.random.default_rng(seed).permutation(kept)

    def split(start: int, size: int) -> Split:
        chosen = order[start : start + size]
        return Split([texts[i] for i in chosen], np.array([labels[i] for i in chosen], np.int32))

    return Splits(
        train=split(0, train),
        validation=split(train, validation),
        test=split(train + validation, test),
        class_names=CLASS_NAMES,
        rows=len(texts),
        duplicates=len(texts) - len(kept) - conflicts,
        conflicts=conflicts,
    )


def _read(path: Path) -> tuple[list[str], list[int]]:
    texts, labels = [], []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                sample = json.loads(line)
                text, label = sample["input"][-1]["content"], sample["ideal"]
            except (ValueError, LookupError, TypeError) as error:
                raise DatasetError(
                    f"{path}, line {number}: not a chat sample with `input` and `ideal` ({error!r})"
                ) from error
            if not isinstance(text, str) or not text.strip() or label not in ("0", "1"):
                raise DatasetError(
                    f"{path}, line {number}: needs a text that is not empty and the label "
                    f'"0" or "1", got {text!r} and {label!r}'
                )
            texts.append(text)
            labels.append(int(label))
    return texts, labels


def _distinct(texts: Sequence[str], labels: Sequence[int]) -> tuple[list[int], int]:
    """Returns the index of the first occurrence of every text, and the number of conflicts."""
    occurrences: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        occurrences.setdefault(" ".join(text.casefold().split()), []).append(index)
    kept, conflicts = [], 0
    for indices in occurrences.values():
        if len({labels[i] for i in indices}) == 1:
            kept.append(indices[0])
        else:
            conflicts += len(indices)
    return kept, conflicts
