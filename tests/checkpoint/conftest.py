"""Saved adapters, and the states and the checkpoints of one run; each is made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dora_jax.checkpoint import Checkpoints, save
from tests.checkpoint.chains import CONFIGS, trained_nnx
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


@pytest.fixture(scope="session")
def saved_adapters(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    save(path, trained_nnx(CONFIGS["dora"]), CONFIGS["dora"])
    return path


@pytest.fixture
def folder(saved_adapters, tmp_path):
    """A copy of a folder of saved adapters."""
    return Path(shutil.copytree(saved_adapters, tmp_path / "adapter"))
