"""The command, run in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dora_jax.checkpoint import save
from dora_jax.cli import main
from tests.cli.folders import CONFIG, llama_base, trained, write_peft


@pytest.fixture
def run(capsys):
    """Returns a function that runs a command; it returns the status, the output, the errors."""

    def command(*args):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture
def done(run):
    """Returns a function that runs a command, which has to succeed; it returns the output."""

    def command(*args):
        status, out, errors = run(*args)
        assert status == 0, errors
        return json.loads(out) if "--json" in args else out

    return command


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Returns an Orbax folder, which tests must not change."""
    folder = tmp_path_factory.mktemp("orbax") / "adapter"
    save(folder, trained(CONFIG), CONFIG)
    return folder


@pytest.fixture
def llama_adapter(tmp_path):
    """Returns a PEFT folder for the base in `LLAMA_BASE`."""
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 3}
    write_peft(tmp_path / "peft", llama_base(), ranks, np.random.default_rng(1))
    return tmp_path / "peft"
