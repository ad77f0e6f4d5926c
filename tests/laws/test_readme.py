"""The examples of the README, and of the page on quantised bases, run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
QUANTIZED = README.parent / "docs" / "quantized.md"


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
def test_the_page_on_quantised_bases_runs():
    for block in blocks_of(QUANTIZED):
        exec(compile(block, str(QUANTIZED), "exec"), {})
