"""Settings of the property tests. Helpers are imported as `tests.support.reference`, `tests.support.models`."""

from __future__ import annotations

import os

import hypothesis

# No deadline: the first example of a test compiles. Continuous integration draws the same examples
# in every run, so that it fails only for what a change did.
hypothesis.settings.register_profile(
    "dora", max_examples=25, deadline=None, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("dora")
