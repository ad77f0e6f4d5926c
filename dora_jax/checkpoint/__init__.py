"""Adapters and training runs on disk, through Orbax.

Every folder has a manifest with checksums, and the fingerprint of the base that the adapters were
trained on. Reading it therefore detects damage and a wrong base.
"""

from dora_jax.checkpoint.adapters import load, save
from dora_jax.checkpoint.saved import SavedAdapters, read_adapters
from dora_jax.checkpoint.step import RestoredRun
from dora_jax.checkpoint.training import Checkpoints

__all__ = [
    "Checkpoints",
    "RestoredRun",
    "SavedAdapters",
    "load",
    "read_adapters",
    "save",
]
