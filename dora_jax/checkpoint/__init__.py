"""Adapters and training runs on disk, through Orbax.

Every folder has a manifest with checksums, and the fingerprint of the base that the adapters were
trained on, so that damage and a wrong base are noticed when it is read.
"""

from dora_jax.checkpoint.adapters import SavedAdapters, load, read_adapters, save
from dora_jax.checkpoint.training import Checkpoints, RestoredRun

__all__ = [
    "Checkpoints",
    "RestoredRun",
    "SavedAdapters",
    "load",
    "read_adapters",
    "save",
]
