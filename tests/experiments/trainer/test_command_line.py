"""How an experiment ends: in a line, with the exit status that says why."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import ablation, efficiency, quickstart
from experiments.tasks.download import DownloadError
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.finite import DivergedError

REPOSITORY = Path(__file__).parents[3]
SIGNALS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_block_with_its_status_and_a_second_one_is_not_needed(number, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]
    ended = []
    with pytest.raises(SystemExit) as raised, in_one_line("To go on, start again."):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            ended.append("as it should")
    assert (raised.value.code, ended) == (128 + number, ["as it should"])
    assert capsys.readouterr().err == f"\n{SIGNALS[number]}. To go on, start again.\n"
    assert before == [signal.getsignal(each) for each in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", ["quickstart", "ablation", "efficiency"])
def test_a_signal_during_the_imports_ends_in_a_line(number, name, tmp_path):
    """The process interrupts itself when it starts to import JAX."""
    (tmp_path / "jax.py").write_text(f"import os; os.kill(os.getpid(), {int(number)})")
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stderr) == (128 + number, f"\n{SIGNALS[number]}.\n")
    assert not done.stdout


@pytest.mark.parametrize(
    "error", [DownloadError("no network\nhow to mend it"), DivergedError("a"), OSError(28, "full")]
)
def test_what_a_user_can_mend_is_said_without_a_traceback(error):
    with pytest.raises(SystemExit) as raised, in_one_line(""):
        raise error
    assert raised.value.code == str(error)


@pytest.mark.parametrize("module", [quickstart, ablation, efficiency])
def test_the_empty_path_of_an_unset_variable_is_refused(module, capsys):
    paths = [f.name for f in dataclasses.fields(module.Config) if "Path" in str(f.type)]
    assert paths
    for name in paths:
        option = f"--{name.replace('_', '-')}"
        for given in ((option, ""), (option, " "), (f"{option}=",)):
            with pytest.raises(SystemExit) as raised:
                settings(module.Config, None, given)
            assert raised.value.code == 2
            assert capsys.readouterr().err == f"{option} is empty: is a variable unset?\n"


@pytest.mark.full
def test_without_a_network_the_first_line_says_so(tmp_path):
    variables = {"PIP_NO_INDEX": "1", "DORA_JAX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", f"--run-folder={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=REPOSITORY,
    )
    first, *_ = (line for line in done.stderr.splitlines() if line)
    assert done.returncode == 1 and "could not be downloaded: is there a network?" in first
    assert "Traceback" not in done.stderr
