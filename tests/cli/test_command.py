"""The command line itself: its errors, exit statuses and help."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from tests.cli.folders import FIXTURES, LLAMA_BASE, PEFT_FOLDER


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
    ):
        given, out, errors = run(*args)
        assert (given, out, errors.count("\n")) == (status, "", 1), (args, errors)
        assert errors.startswith("dora-jax: ") and message in errors
    for args in ((), ("frobnicate",), ("inspect",), ("inspect", folder, "--yaml")):
        status, out, errors = run(*args)
        assert status == 2 and not out and errors


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
