"""The states and the checkpoints of one run, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dora_jax.checkpoint import Checkpoints
from tests.checkpoint.runs import CONFIG, everything, nnx_run, nnx_step


@pytest.fixture(scope="session")
def trained():
    """The state of an NNX run after each of its steps, by step."""
    model, optimizer = nnx_run()
    states = {0: everything(model, optimizer)}
    for step in range(1, 9):
        nnx_step(model, optimizer)
        states[step] = everything(model, optimizer)
    return states


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4; to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    model, optimizer = nnx_run()
    with Checkpoints(folder, CONFIG) as checkpoints:
        for step in range(1, 5):
            nnx_step(model, optimizer)
            if step % 2 == 0:
                checkpoints.save(step, model, optimizer, metrics={"loss": 1 / step})
    return folder


@pytest.fixture
def run_folder(saved, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))
