"""Checkpoints of several processes: positions of each, a damaged part, what is not the same."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.processes.cluster import run

pytestmark = pytest.mark.full


def said(action, folder, processes=2):
    run("tests.processes.checkpoints", action, folder, processes=processes, devices=2 // processes)
    return [(folder / f"said-{i}").read_text().splitlines() for i in range(processes)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, said("save", folder)


def largest(step):
    return str(np.random.default_rng(step).normal(size=(4096, 4)).astype(np.float32).max())


def test_what_each_process_has_to_itself_is_to_be_the_same(saved):
    for (line,) in saved[1]:
        assert line.startswith("state/count differs between the processes")


def test_each_process_goes_on_at_its_own_position(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    for i, lines in enumerate(said("restore", tmp_path)):
        assert lines == ["2", f"{{'next': {20 + i}}}", "2", str(20 + i), largest(2)]


def test_another_number_of_processes_gets_all_positions(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    ((*lines, error),) = said("restore", tmp_path, processes=1)
    assert lines == ["2", "[{'next': 20}, {'next': 21}]", "2", "0", largest(2)]
    assert error.startswith("step 2: each process of the run had its own position in the data")


def test_a_part_that_is_damaged_in_one_process_sends_all_back(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    own = tmp_path / "run" / "2" / "arrays" / "ocdbt.process_1" / "d"
    file = max(own.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    for i, (step, position, *_, warning) in enumerate(said("restore", tmp_path)):
        assert (step, position) == ("1", f"{{'next': {10 + i}}}")
        assert warning.startswith("skipping a damaged checkpoint: ")
