"""Has small kernels treated as large ones, of which `V` is formed a few columns at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax

from dora_jax.decomposition import columns


@contextlib.contextmanager
def in_blocks() -> Iterator[None]:
    """Within it no kernel is small. What was traced before is forgotten, and again at the end."""
    jax.clear_caches()
    try:
        with mock.patch.object(columns, "_WHOLE", 0):
            yield
    finally:
        jax.clear_caches()
