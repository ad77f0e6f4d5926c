"""Regular expressions over dotted paths, matched without backtracking."""

from dora_jax.patterns.pattern import LONGEST, Pattern, compiled

__all__ = ["LONGEST", "Pattern", "compiled"]
