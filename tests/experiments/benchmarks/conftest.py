"""Settings of the tests of the benchmark."""

import gc

import pytest


@pytest.fixture(autouse=True)
def frozen_objects():
    """The timing collects garbage in every round: not the objects of the other tests, too."""
    gc.freeze()
    yield
    gc.unfreeze()
