"""Live comparison with PEFT: `make test-peft` runs these tests, in an environment of its own."""

from __future__ import annotations

import importlib.util

NEEDED = ("torch", "transformers", "peft")

if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["*.py"]
