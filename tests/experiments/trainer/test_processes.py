"""Two processes train to what one trains to, and end after the same step when one is to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from experiments.tasks.metrics import read_metrics
from tests.experiments.trainer.fits import adapters, run


def start(folder, address, index):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    module = "tests.experiments.trainer.fits"
    return subprocess.Popen(
        [sys.executable, "-m", module, str(folder), "fsdp=4", "1", address, str(index)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )


def check_close(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.full
def test_two_processes_train_as_one_and_save_the_same_step_when_one_is_terminated(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(tmp_path / "two", address, index) for index in range(2)]
    model, _ = run(tmp_path / "one")
    expected = adapters(model)
    ends = []
    for process in processes:
        lines = process.communicate(timeout=300)[0].splitlines()
        assert process.returncode == 0
        check_close(json.loads(next(line for line in lines if line.startswith("{"))), expected)
        ends.append(lines[-1])
    number, step = map(int, ends[0].split())
    assert ends[0] == ends[1] and number == signal.SIGTERM and step >= 4
    assert read_metrics(tmp_path / "two-stopped")[-1]["step"] == step
    resumed, fitted = run(tmp_path / "two-stopped")  # in one process
    assert fitted.resumed_from_step == step
    check_close(adapters(resumed), expected)
