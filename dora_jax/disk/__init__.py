"""Folders on disk that are written whole: any reader finds the old version or the new one.

A new version is written into a folder beside the old one, with a name that no other process has,
and takes its place in one step. What a killed process left is known by its lock, which a kill
frees, and is removed by the next writer. A symbolic link stays, and what it points to is replaced.
"""

from dora_jax.disk.full import full_disk, ignore_late_threads, said_once
from dora_jax.disk.locks import read_in_one_piece, unchanged
from dora_jax.disk.paths import Folder, given_folder, target_folder
from dora_jax.disk.replacing import remove_folder, written_whole
from dora_jax.disk.together import written_by_all

__all__ = [
    "Folder",
    "full_disk",
    "given_folder",
    "ignore_late_threads",
    "read_in_one_piece",
    "remove_folder",
    "said_once",
    "target_folder",
    "unchanged",
    "written_by_all",
    "written_whole",
]
