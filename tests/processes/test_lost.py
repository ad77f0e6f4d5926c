"""A lost process ends the others soon, whichever it was and whatever they do."""

from __future__ import annotations

import signal

import pytest

from tests.processes.cluster import start, wait


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("busy", [0, 60])
def test_a_lost_process_ends_the_other(victim, busy):
    ended = wait(start("tests.processes.lost", victim, busy, processes=2, devices=1))
    lost, other = ended[victim], ended[1 - victim]
    assert lost.status == -signal.SIGKILL
    assert 0 < other.ended - lost.ended < 30
    if other.status == -signal.SIGABRT:  # JAX ends it, in words of its own
        assert "the JAX distributed service detected fatal errors" in other.errors
    else:
        assert other.status == 1 and not busy
        said = f"Process {1 - victim} of 2 lost another one, and ends ("
        (line,) = [line for line in other.errors.splitlines() if line.startswith(said)]
        assert line.endswith("Start it again.") and "Traceback" not in other.errors
