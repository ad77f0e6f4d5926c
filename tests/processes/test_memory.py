"""What a host holds and writes while a run of several processes saves: its own parts."""

from __future__ import annotations

import pytest

from tests.processes.cluster import run


@pytest.mark.full
def test_a_process_saves_and_restores_its_own_parts_alone(tmp_path):
    run("tests.processes.memory", tmp_path / "run", processes=2, devices=2)
    for i in range(2):
        own, written, saving, restoring = map(int, (tmp_path / f"run-{i}").read_text().split())
        assert own > 190e6  # half of all
        assert 0.85 * own < written < 1.05 * own  # Orbax compresses
        assert saving < 1.5 * own
        assert restoring < 2.2 * own  # the restored arrays among them; all arrays are 2 of these
