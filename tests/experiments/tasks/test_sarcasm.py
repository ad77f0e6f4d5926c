from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.tasks import download
from experiments.tasks.sarcasm import DatasetError, load_sarcasm


def line(text: str, label: str) -> str:
    turns = [{"role": "system", "content": "Sarcastic?"}, {"role": "user", "content": text}]
    return json.dumps({"input": turns, "ideal": label})


@pytest.fixture
def samples(tmp_path):
    """60 distinct texts, each with its own label; 5 repetitions; 3 rows of a text in conflict."""
    rows = [line(f"headline {i}", str(i % 3 % 2)) for i in range(60)]
    rows += [line("headline 0", "0")] * 3 + [line("HEADLINE  1", "1"), line(" headline 2\t", "0")]
    rows += [line("both", "0"), line("both", "1"), line("Both", "1")]
    path = tmp_path / "samples.jsonl"
    path.write_bytes("\r\n".join(rows).encode())
    return path


def test_every_text_is_in_one_split_only_and_keeps_its_label(samples):
    splits = load_sarcasm(samples, train=30, validation=10, test=20)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [30, 10, 20]
    texts = [text for part in parts for text in part.texts]
    assert sorted(texts) == sorted(f"headline {i}" for i in range(60))
    for part in parts:
        assert part.labels.dtype == np.int32
        assert part.labels.tolist() == [int(text.split()[1]) % 3 % 2 for text in part.texts]


def test_repetitions_are_dropped_once_and_conflicts_wholly(samples):
    splits = load_sarcasm(samples, train=30, validation=10, test=20)
    assert (splits.rows, splits.duplicates, splits.conflicts) == (68, 5, 3)


def test_split_depends_on_the_seed_alone(samples):
    sizes = {"train": 30, "validation": 10, "test": 20}
    first, again, other = (load_sarcasm(samples, **sizes, seed=seed) for seed in (0, 0, 1))
    assert first.test.texts == again.test.texts
    assert first.test.texts != other.test.texts


def test_majority_accuracy(samples):
    split = load_sarcasm(samples, train=58, validation=1, test=1).train
    ones = split.labels.mean()
    assert split.majority_accuracy() == pytest.approx(max(ones, 1 - ones))


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "{",
        "3",
        '{"input": [], "ideal": "1"}',
        '{"input": [{"content": "text"}]}',
        '{"input": [{"content": 5}], "ideal": "1"}',
        line(" ", "1"),
        line("text", "2"),
        line("text", "1").replace('"1"', '["1"]'),
    ],
)
def test_malformed_line_is_named(tmp_path, malformed):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join([line("one", "0"), malformed, line("two", "1")]))
    with pytest.raises(DatasetError, match="line 2"):
        load_sarcasm(path)


@pytest.mark.parametrize("sizes", [(31, 10, 20), (30, 0, 20), (-5, 10, 20)])
def test_sizes_that_cannot_be_had_are_refused(samples, sizes):
    train, validation, test = sizes
    with pytest.raises(DatasetError, match="60 distinct texts"):
        load_sarcasm(samples, train=train, validation=validation, test=test)


def test_published_file_gives_the_documented_numbers():
    if not download.SARCASM.path().exists():
        pytest.skip("the file is not in the cache; experiments.tasks.download.sarcasm_file gets it")
    splits = load_sarcasm(download.sarcasm_file())
    assert (splits.rows, splits.duplicates, splits.conflicts) == (28614, 116, 0)
    assert splits.test.majority_accuracy() == 0.5205
