"""Damaged folders are read as what they are, or refused with an error of the library's."""

from __future__ import annotations

import dataclasses

import pytest
from safetensors.numpy import load_file

from tests.fuzz.formats import FORMATS, whole
from tests.fuzz.runs import BAD, judge, run


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.full)])
def test_damage_is_an_error_or_changes_nothing(count):
    outcomes = list(run(seed=count, count=count))
    assert not [outcome for outcome in outcomes if outcome.kind in BAD]
    assert sum(outcome.kind == "error" for outcome in outcomes) > count / 2


def test_a_careless_reader_is_caught(tmp_path):
    kind = next(kind for kind in FORMATS if kind.name == "peft")
    kind.make(tmp_path / "a")
    right = whole(kind, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert judge(kind, tmp_path / "a", right)[0] == "error"
    careless = dataclasses.replace(kind, read=lambda folder: load_file(file))
    assert judge(careless, tmp_path / "a", right)[0] == "silent"
    file.unlink()
    assert judge(careless, tmp_path / "a", right)[0] == "raw"
