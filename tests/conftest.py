"""Settings of the property tests; which tests are left to the full set.

Helpers are imported as `tests.support.models` and the like.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

from tests.support.selection import mark_rows_left_out

# No deadline: the first example of a test compiles. Continuous integration draws the same examples
# in every run, so that it fails only for what a change did.
_common: dict = {"deadline": None, "derandomize": "CI" in os.environ}
hypothesis.settings.register_profile("few", max_examples=8, **_common)
hypothesis.settings.register_profile("many", max_examples=60, **_common)
hypothesis.settings.load_profile("few")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items):
    """Leaves the notebooks, and rows beyond those that a table asks for, to the full set."""
    mark_rows_left_out(items)
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.full)
