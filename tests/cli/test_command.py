"""The command line itself: its errors, exit statuses and help."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dora_jax.cli.commands import _print
from tests.cli.folders import FIXTURES, LLAMA_BASE, PEFT_FOLDER
from tests.support.disk import full_disk


def test_errors_are_one_line_and_statuses_are_those_of_the_help(folder, tmp_path, run):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "arrays")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}'
    )
    (pickled / "adapter_model.bin").write_bytes(b"")
    peft, identity = PEFT_FOLDER / "llama", ("--names", "identity")
    link = tmp_path / "link"
    link.symlink_to(peft)
    for status, args, message in (
        (1, ("inspect", tmp_path / "none"), "is not a folder"),
        (1, ("inspect", tmp_path / "empty"), "not a checkpoint of dora_jax"),
        (1, ("inspect", broken), "damaged or incomplete"),
        (1, ("inspect", pickled), "pickle"),
        (2, ("diff", folder, broken), "damaged or incomplete"),
        (2, ("diff", folder, peft), "convert one of them"),
        (1, ("convert", PEFT_FOLDER / "gpt2", tmp_path / "o", *identity), "fan_in_fan_out"),
        (1, ("convert", folder, tmp_path, "--names", "identity"), "exists"),
        (1, ("convert", folder, tmp_path / "p", "--names", "llama"), "name map"),
        (1, ("convert", peft, tmp_path / "o", "--names", "bert"), "name map"),
        (1, ("merge", LLAMA_BASE, folder, tmp_path / "m"), "--names"),
        (1, ("convert", folder, tmp_path / "p", "--names", "bert", "--extra-names", "a"), "pairs"),
        (1, ("merge", tmp_path / "none", peft, tmp_path / "m"), "is not a folder"),
        (1, ("merge", LLAMA_BASE, peft, LLAMA_BASE), "is read from"),
        (1, ("merge", LLAMA_BASE, peft, LLAMA_BASE / ".." / LLAMA_BASE.name), "is read from"),
        (1, ("merge", LLAMA_BASE, peft, link, "--overwrite"), "is read from"),
        (1, ("convert", peft, link, "--names", "llama", "--overwrite"), "is read from"),
        (1, ("convert", folder, folder, *identity, "--overwrite"), "is read from"),
        (1, ("convert", folder, tmp_path, *identity, "--base", tmp_path), "is read from"),
        (1, ("convert", folder, ".", *identity, "--overwrite"), "the current folder"),
        (1, ("merge", LLAMA_BASE, peft, "/", "--overwrite"), "the current folder, or one around"),
    ):
        given, out, errors = run(*args)
        assert (given, out, errors.count("\n")) == (status, "", 1), (args, errors)
        assert errors.startswith("dora-jax: ") and message in errors
        given, out, again = run(*args, "--json")
        assert (given, again) == (status, errors)
        assert f"dora-jax: {json.loads(out)['error']}\n" == errors
    for args in ((), ("frobnicate",), ("inspect",), ("inspect", folder, "--yaml")):
        status, out, errors = run(*args)
        assert status == 2 and not out and errors
        status, out, again = run(*args, "--json")
        assert status == 2 and json.loads(out)["error"].startswith("the command line is wrong")


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "{}"),
        ("diff", "a", "{}"),
        ("convert", "{}", "a", "--names", "identity"),
        ("convert", "a", "{}", "--names", "identity"),
        ("convert", "a", "b", "--names", "identity", "--base", "{}"),
        ("convert", "a", "b", "--names", "identity", "--base={}"),
        ("merge", "{}", "a", "b"),
        ("merge", "a", "{}", "b"),
        ("merge", "a", "b", "{}"),
    ],
    ids=" ".join,
)
def test_the_empty_path_of_an_unset_variable_is_refused(args, run):
    for empty in ("", " "):
        status, out, errors = run(*(arg.format(empty) for arg in args))
        assert (status, out) == (2, "") and "the path is empty: is a variable unset?" in errors


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_on_a_full_disk_the_error_is_one_line_and_nothing_is_left(
    command, tmp_path, run, done, llama_adapter
):
    adapter = llama_adapter
    if command == "convert":  # to PEFT's files; the other way is `dora.save`
        done("convert", adapter, tmp_path / "orbax", "--names", "llama", "--base", LLAMA_BASE)
        args = ("convert", tmp_path / "orbax", tmp_path / "deep" / "out", "--names", "llama")
    else:
        args = ("merge", LLAMA_BASE, adapter, tmp_path / "deep" / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    with full_disk(1000):
        status, out, errors = run(*args)
    assert (status, out, errors.count("\n")) == (1, "", 1), errors
    assert "out cannot be written: File too large" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_the_imports_is_one_line(number, tmp_path):
    """The process interrupts itself when it starts to import JAX, long before `main`."""
    (tmp_path / "jax.py").write_text(f"import os; os.kill(os.getpid(), {int(number)})")
    path = os.pathsep.join((str(tmp_path), str(FIXTURES.parents[1])))
    command = [sys.executable, "-m", "dora_jax", "inspect", "x", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (done.returncode, done.stderr) == (128 + number, f"dora-jax: {word}\n")
    assert json.loads(done.stdout) == {"error": word}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(number, tmp_path, run, llama_adapter, monkeypatch):
    def interrupting(*args):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("dora_jax.cli.merge.copy_companions", interrupting)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, errors = run("merge", LLAMA_BASE, llama_adapter, tmp_path / "out", "--json")
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (status, errors) == (128 + number, f"dora-jax: {word}\n")
    assert json.loads(out) == {"error": word}
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_the_module_runs_as_a_command(folder):
    command = [sys.executable, "-m", "dora_jax", "inspect", str(folder), "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=FIXTURES.parents[1])
    assert printed.returncode == 0 and not printed.stderr
    assert json.loads(printed.stdout)["format"] == "orbax"


def test_without_tyro_the_command_says_what_to_install(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, _, errors = run("inspect", "x")
    assert status == 1 and "pip install 'dora-jax[cli]'" in errors


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in ("inspect", "diff", "convert", "merge"):
        assert command in out
        status, text, _ = run(command, "--help")
        assert status == 0 and "--json" in text


def test_numbers_that_json_does_not_have_are_null(capsys):
    _print({"a": [float("nan"), {"b": float("inf")}], "c": 1.5}, "", as_json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, {"b": None}],
        "c": 1.5,
    }


def test_the_library_leaves_the_signals_of_other_programs_alone():
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        assert not getattr(handler, "__module__", "").startswith("dora_jax")
