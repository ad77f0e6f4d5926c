"""Regular expressions over dotted paths, matched without backtracking."""

from dora_jax.patterns.pattern import Pattern, compiled

__all__ = ["Pattern", "compiled"]
