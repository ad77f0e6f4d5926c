"""`python -m dora_jax`: the same as the command `dora-jax`."""

from __future__ import annotations

import sys

from dora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
