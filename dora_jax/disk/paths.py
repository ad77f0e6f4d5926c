"""Paths of folders, as they are given and as they may be written."""

from __future__ import annotations

import os
import pathlib

from dora_jax.errors import CheckpointError

Folder = str | os.PathLike[str]


def given_folder(folder: Folder) -> pathlib.Path:
    """Returns a path as an absolute one; `~` is the home folder.

    Raises:
      CheckpointError: the path is an empty string, as an unset variable of a shell gives.
    """
    if not os.fspath(folder).strip():
        raise CheckpointError("the path of a folder is empty: is a variable unset?")
    return pathlib.Path(folder).expanduser().absolute()


def target_folder(folder: Folder, *inputs: Folder) -> pathlib.Path:
    """Returns the absolute path of a folder that may be written, with symbolic links resolved.

    Args:
      folder: where to write.
      inputs: folders that are read for it.

    Raises:
      CheckpointError: it is one of the inputs, a file, or the current folder or one around it,
        which an unset variable names as well.
    """
    path = pathlib.Path(os.path.realpath(given_folder(folder)))
    here = pathlib.Path.cwd()
    if path == here or path in here.parents:
        raise CheckpointError(
            f"{os.fspath(folder)!r} is the current folder, or one around it, and would be "
            "replaced: name a folder of its own"
        )
    for other in inputs:
        if path == pathlib.Path(os.path.realpath(other)) or _is_same(path, other):
            raise CheckpointError(f"{folder} is read from: choose another folder to write")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{folder} is a file: choose another path")
    return path


def _is_same(path: pathlib.Path, other: Folder) -> bool:
    return path.exists() and os.path.exists(other) and os.path.samefile(path, other)
