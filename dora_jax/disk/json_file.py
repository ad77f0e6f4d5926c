"""JSON files that others wrote: read in bounded time and memory, whatever is in their place."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dora_jax.errors import CheckpointError, DoRAError

if TYPE_CHECKING:
    from os import PathLike

# A configuration of 50,000 names takes 3 MB. The smallest objects take 20 times their text.
LARGEST = 5_000_000
# Of a parameter, with its path. Looking names up takes the square of their length.
LONGEST_NAME = 1000
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
IS_LFS_POINTER = (
    "a git-LFS pointer, which stands for the file: fetch the file itself (git lfs pull)"
)


def is_file(path: str | PathLike[str]) -> bool:
    """Returns whether a path is a regular file, or a link to one: no pipe, device or folder."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # of a name that is too long, or holds NUL
        return False


def is_folder(path: str | PathLike[str]) -> bool:
    """Returns whether a path is a folder, or a link to one."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def shown(path: str | PathLike[str]) -> str:
    """Returns a path for an error message, shortened if it is very long."""
    text = os.fspath(path)
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return text if text.isprintable() else ascii(text)


def read_json(path: str | PathLike[str], *, largest: int = LARGEST) -> Any:
    """Returns the value in a JSON file.

    Args:
      path: of the file.
      largest: the number of bytes that it may have.

    Raises:
      CheckpointError: the file is missing or no regular file, is larger, or holds no JSON; names
        it.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder, "config.json")
      ...     _ = file.write_text('{"rank": 8}')
      ...     read_json(file)
      {'rank': 8}
    """
    return parse_json(read_text(path, largest=largest), shown(path))


def read_text(path: str | PathLike[str], *, largest: int = LARGEST) -> str:
    """Returns the text of a file; arguments and errors are those of `read_json`."""
    try:
        if not is_file(path):
            found = "is no regular file" if os.path.lexists(path) else "is missing"
            raise CheckpointError(f"{shown(path)} {found}: fetch it again")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(min(size, largest) + 1)  # memory is taken for all that is asked for
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {reason(error)}") from error
    if len(data) > largest:
        raise CheckpointError(f"{shown(path)} has more than {largest:,} bytes: fetch it again")
    if data.startswith(LFS_POINTER):
        raise CheckpointError(f"{shown(path)} is {IS_LFS_POINTER}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{shown(path)} is not UTF-8 ({reason(error)}): fetch it again"
        ) from error


def parse_json(
    text: str,
    name: str,
    *,
    parse_constant: Callable[[str], Any] | None = None,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Returns the value of a JSON text.

    Args:
      text: the text.
      name: of its file, for the error.
      parse_constant, object_pairs_hook: as for `json.loads`.

    Raises:
      CheckpointError: it is no JSON, is nested too deeply, or holds an endless integer.
    """
    try:
        return json.loads(text, parse_constant=parse_constant, object_pairs_hook=object_pairs_hook)
    except DoRAError:  # of a hook
        raise
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested too deeply: fetch it again") from error
    except ValueError as error:  # JSONDecodeError, or an integer of more than 4,300 digits
        raise CheckpointError(
            f"{name} is not valid JSON ({reason(error)}): fetch it again"
        ) from error


def reason(error: BaseException) -> str:
    """Returns the first line of an error, for another one's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
