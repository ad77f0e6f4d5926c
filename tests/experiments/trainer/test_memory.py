"""Freed memory that is kept is not faulted in again."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from experiments.trainer.memory import keep_freed_memory

kept = {keep} and keep_freed_memory()
np.ones(2**24)  # 128 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    code = FAULTS.format(keep=keep)
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    done, count = output.stdout.split()
    return done == "True", int(count)


def test_what_is_freed_is_used_again():
    done, count = faults(True)
    if not done:
        pytest.skip("the C library has no mallopt")
    _, without = faults(False)
    assert count < 100 < without
