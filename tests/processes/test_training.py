"""A run of two processes: it equals one of one process, and goes on on any number of them.

Each run takes six steps on four devices and keeps the checkpoints of steps 4 and 6.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.processes.cluster import run, start, wait

pytestmark = pytest.mark.full
MESH = "fsdp=2,tensor=2"


def train(front_end, folder, processes):
    lines = run(
        "tests.processes.train",
        front_end,
        folder,
        MESH,
        6,
        processes=processes,
        devices=4 // processes,
    )[0].splitlines()
    return next(line for line in lines if line.startswith("start")), np.load(f"{folder}/end-6.npz")


@pytest.fixture(scope="module", params=["linen", "nnx"])
def front_end(request):
    return request.param


@pytest.fixture(scope="module")
def unbroken(front_end, tmp_path_factory):
    """The folders and last adapters of runs that nothing broke, by their number of processes."""
    folders = {n: tmp_path_factory.mktemp(f"{front_end}-{n}") for n in (1, 2)}
    return {n: (folder, train(front_end, folder, n)[1]) for n, folder in folders.items()}


def differences(one, other):
    assert one.files == other.files
    return [float(np.abs(one[k] - other[k]).max() / np.abs(other[k]).max()) for k in one.files]


def test_two_processes_train_as_one_does(unbroken):
    assert max(differences(unbroken[2][1], unbroken[1][1])) <= 1e-6


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_on_any_number_of_processes(front_end, unbroken, before, after, tmp_path):
    folder, end = unbroken[before]
    shutil.copytree(folder / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    begun, resumed = train(front_end, tmp_path, after)
    assert begun == "start 4"
    assert max(differences(resumed, end)) <= (0 if before == after else 1e-6)


def test_a_lost_process_ends_the_other_and_the_run_goes_on(
    front_end, unbroken, tmp_path, monkeypatch
):
    monkeypatch.setenv("KILL_PROCESS", "1")
    monkeypatch.setenv("KILL_STEP", "4")
    first, lost = wait(
        start("tests.processes.train", front_end, tmp_path, MESH, 6, processes=2, devices=2)
    )
    assert lost.status == -9 and first.status not in (0, -9)
    assert abs(first.ended - lost.ended) < 30
    assert "Process 0 of 2 lost another one" in first.errors
    assert "Start it again." in first.errors and "Traceback" not in first.errors
    monkeypatch.delenv("KILL_STEP")
    begun, resumed = train(front_end, tmp_path, 2)
    assert begun == "start 4" and max(differences(resumed, unbroken[2][1])) == 0
