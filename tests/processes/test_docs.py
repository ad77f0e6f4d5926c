"""The program of the page about several hosts runs as it stands, in two processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.processes.cluster import run

PAGE = Path(__file__).parents[2] / "docs" / "many_hosts.md"


@pytest.mark.full
def test_the_program_of_the_page_trains_and_goes_on(tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "train_of_the_page.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "run"
    first = run("train_of_the_page", folder, processes=2)[0]
    assert "step 10: loss" in first
    shutil.rmtree(folder / "10")
    again = run("train_of_the_page", folder, processes=2)[0]
    assert "step 6: loss" in again and "step 5: loss" not in again
    # The first step is compiled for another placement.
    assert again.splitlines()[-1][:-2] == first.splitlines()[-1][:-2]
