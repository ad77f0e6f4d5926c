"""The examples of the README, and of pages with programs, run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
PAGES = [README.parent / "docs" / name for name in ("quantized.md", "adaptive_rank.md")]


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = blocks_of(README)


def test_there_is_an_example_for_each_front_end():
    assert sum("nnx" in block for block in BLOCKS) >= 1
    assert sum("linen" in block for block in BLOCKS) >= 1


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_example_runs(block):
    exec(compile(block, str(README), "exec"), {})


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_programs_of_a_page_run(page):
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), {})
