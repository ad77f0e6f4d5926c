"""Models of other libraries: `make test-models` runs these tests, in an environment of its own."""

from __future__ import annotations

import importlib.util

NEEDED = ("transformers", "mamba2_jax", "tunix")

if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["*.py"]
