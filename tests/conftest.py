"""Settings of the property tests. Helpers are imported as `tests.support.models` and the like."""

from __future__ import annotations

import os

import hypothesis

# No deadline: the first example of a test compiles. Continuous integration draws the same examples
# in every run, so that it fails only for what a change did.
_common: dict = {"deadline": None, "derandomize": "CI" in os.environ}
hypothesis.settings.register_profile("few", max_examples=8, **_common)
hypothesis.settings.register_profile("many", max_examples=100, **_common)
hypothesis.settings.load_profile("few")
