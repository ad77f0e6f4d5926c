"""The manifest of a folder: read, and checked part by part before anything in it is used.

Its checksum shows damage. It does not show who wrote it, so a manifest may hold anything.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from dora_jax.disk.json_file import (
    LONGEST_NAME,
    is_file,
    parse_json,
    read_json,
    read_text,
    reason,
    shown,
)
from dora_jax.errors import CheckpointError, Path

FORMAT = "dora_jax/1"
_MEMBERS = ("format", "arrays", "metadata")
# 100,000 arrays take 20 MB; the position in the data may be long.
_LARGEST = 64_000_000
_DEEPEST = 100
_MEMBERS_OF_ENTRY = {"shape", "dtype", "sha256", "parts", "key"}


def read_manifest(file: Any) -> dict[str, Any]:
    """Returns the checked content of a manifest.

    Args:
      file: its path, as Orbax gives it; it may be remote.

    Raises:
      CheckpointError: it is missing, damaged, of another format, or holds what no manifest does;
        names the file and the part.
    """
    if is_remote(file):
        text = file.read_text()
    else:
        try:
            text = read_text(file, largest=_LARGEST)
        except CheckpointError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    try:
        content = parse_json(text, str(file))
        canonical = b"" if not isinstance(content, dict) else canonical_json(content)
    except (CheckpointError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{file} is not a manifest of dora_jax")
    if content.pop("sha256", None) != digest(canonical):
        raise CheckpointError(f"{file} is damaged: it does not match its own sha256")
    if content["format"] != FORMAT or tuple(content) != _MEMBERS:
        raise CheckpointError(
            f"{file} has format {content['format']!r}, this version reads {FORMAT!r}: "
            "use the dora_jax that wrote it, or a newer one"
        )
    if problem := _problem(content["arrays"]):
        raise CheckpointError(f"{file}: {problem}: it is damaged, or no manifest of dora_jax")
    return content


def slashed(path: Path) -> str:
    """Returns the name of a path in a manifest; a slash in a name becomes `~1`, a tilde `~0`.

    Example:
      >>> slashed(("enc/dec", "kernel")), path_of("enc~1dec/kernel")
      ('enc~1dec/kernel', ('enc/dec', 'kernel'))
    """
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)


def path_of(name: str) -> Path:
    """Returns the path of a name that `slashed` made."""
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in name.split("/"))


def check_files(folder: Any) -> None:
    """Raises `CheckpointError` if a folder holds a pipe, a device or a link to nowhere.

    Orbax would wait for a pipe, and read a device, for ever. What another process removes meanwhile
    is nothing.
    """
    if is_remote(folder):
        return
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            if not is_file(path) and os.path.lexists(path):
                raise CheckpointError(f"{path} is no regular file: the folder is damaged")


def check_metrics(folder: Any) -> None:
    """Raises `CheckpointError` if the metrics of a run's step are no JSON, which Orbax reads."""
    if is_remote(folder):
        return
    for file in sorted(folder.glob("*/metrics/metrics")):
        try:
            read_json(file)
        except CheckpointError as error:
            if os.path.lexists(file):  # another process may remove it meanwhile
                raise CheckpointError(f"{error}, or remove {file.parent.parent}") from error


def check_place(folder: Any) -> None:
    """Raises `CheckpointError` if a folder cannot be there: a file is, or its name is no name."""
    if is_remote(folder):
        return
    try:
        mode = os.stat(folder).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(folder)} cannot be a folder: {reason(error)}") from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{folder} is not a folder: choose another path")


def is_remote(path: Any) -> bool:
    """Returns whether a path is in a bucket (`gs://`), not in this machine's file system."""
    return "://" in os.fspath(path)


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """Returns the bytes that the checksum of a manifest is of."""
    return json.dumps({k: v for k, v in content.items() if k != "sha256"}).encode()


def digest(data: Any) -> str:
    """Returns the SHA-256 of bytes, or of an array of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _problem(arrays: Any) -> str:
    """Returns what is wrong with the entries of the arrays; empty if nothing is."""
    if not isinstance(arrays, dict):
        return f"arrays must be an object, not {arrays!r:.100}"
    paths: dict[Path, str] = {tuple(name.split("/")): name for name in arrays}
    for path, name in paths.items():
        if len(name) > LONGEST_NAME or not 2 <= len(path) <= _DEEPEST:
            return f"{name[:100]!r} in arrays is not the path of an array"
        if any(path[:i] in paths for i in range(1, len(path))):
            return f"{name!r} in arrays is inside another array"
        if problem := problem_of_entry(arrays[name]):
            return f"arrays[{name!r}] {problem}"
    return ""


def problem_of_entry(entry: Any) -> str:
    """Returns what is wrong with the entry of an array; empty if nothing is.

        {"shape": [4, 6], "dtype": "float32", "sha256": ...}     one process held the array
        {"shape": ..., "dtype": ..., "parts": [[[[0, 4], [0, 3]], ...], ...]}

    The parts of an array that several processes held have bounds on each axis, and a SHA-256.
    """
    if not (isinstance(entry, dict) and entry.keys() <= _MEMBERS_OF_ENTRY):
        return f"must hold shape, dtype and sha256, not {entry!r:.100}"
    shape = entry.get("shape")
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        return f"has shape {shape!r:.100}"
    if not isinstance(entry.get("dtype"), str):
        return f"has dtype {entry.get('dtype')!r:.100}"
    if "parts" in entry and (problem := _problem_of_parts(entry["parts"], shape)):
        return problem
    checksum = entry.get("sha256")
    if ("parts" in entry) == _is_checksum(checksum):
        return f"has sha256 {checksum!r:.100}"
    return "" if isinstance(entry.get("key", ""), str) else f"has key {entry['key']!r:.100}"


def _problem_of_parts(parts: Any, shape: Sequence[int]) -> str:
    """Returns what is wrong with the parts of an array; empty if they make it up."""
    filled = 0
    for part in parts if isinstance(parts, list) else [parts]:
        if not (isinstance(part, list) and len(part) == 2 and isinstance(part[0], list)):
            return f"has part {part!r:.100}"
        bounds, fits = part[0], len(part[0]) == len(shape) and _is_checksum(part[1])
        for pair, size in zip(bounds, shape, strict=False):
            fits = fits and isinstance(pair, list) and [type(n) for n in pair] == [int, int]
            fits = fits and 0 <= pair[0] <= pair[1] <= size
        if not fits:
            return f"has part {part!r:.100}"
        filled += math.prod(stop - start for start, stop in bounds)
    return "" if filled == math.prod(shape) else "has parts that are not the whole array"


def _is_checksum(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None
