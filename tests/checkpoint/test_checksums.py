"""The checksums of arrays that were saved in parts, as several processes do."""

from __future__ import annotations

import numpy as np
import pytest

from dora_jax.checkpoint.checksums import checksums, matches
from dora_jax.checkpoint.manifest import digest, problem_of_entry

X = np.arange(24, dtype=np.float32).reshape(4, 6)
HALVES = [[[0, 4], [0, 3]], [[0, 4], [3, 6]]]


def entry(bounds, x=X):
    parts = [[each, digest(np.ascontiguousarray(x[cut(each)]).tobytes())] for each in bounds]
    return {"shape": list(x.shape), "dtype": "float32", "parts": parts}


def cut(bounds):
    return tuple(slice(*pair) for pair in bounds)


def test_an_array_matches_its_parts_and_no_other_does():
    assert not problem_of_entry(entry(HALVES))
    assert matches(X, entry(HALVES))
    for part in HALVES:
        damaged = X.copy()
        damaged[cut(part)][1, 1] += 1
        assert not matches(damaged, entry(HALVES))


def test_an_array_of_one_process_is_one_part():
    saved = {"shape": [4, 6], "dtype": "float32", **checksums({"x": X})["x"]}
    assert matches(X, saved) and matches(X, entry([[[0, 4], [0, 6]]]))
    assert not matches(X + 1, saved)


@pytest.mark.parametrize(
    "parts",
    [
        None,
        [],
        [1],
        [[[[0, 4], [0, 3]]]],
        [[HALVES[0], "x"]],
        [[[[0, 4]], "0" * 64]],
        [[[[0, 4], [0, 7]], "0" * 64]],
        [[[[-1, 4], [0, 6]], "0" * 64]],
        [[[[0, 4.0], [0, 6]], "0" * 64]],
        [[[[0, 4], "ab"], "0" * 64]],
        [[HALVES[0], "0" * 64]],
    ],
)
def test_parts_that_do_not_make_up_the_array_are_refused(parts):
    assert "part" in problem_of_entry({**entry(HALVES), "parts": parts})


def test_an_entry_has_one_kind_of_checksum():
    both = {**entry(HALVES), "sha256": "0" * 64}
    assert problem_of_entry(both) and problem_of_entry({"shape": [4, 6], "dtype": "float32"})
