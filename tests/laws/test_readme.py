"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_an_example_for_each_front_end():
    assert sum("nnx" in block for block in BLOCKS) >= 1
    assert sum("linen" in block for block in BLOCKS) >= 1


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_example_runs(block):
    exec(compile(block, str(README), "exec"), {})
