"""Mutations of a folder: bytes, values in JSON, headers, and what stands in a file's place."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
# Values of every JSON type, and texts that take long or much. A text in <> is written as it is.
VALUES: list[Any] = [None, True, False, 0, -1, 3, 0.5, "", "x", "a/b", "NaN", [], {}, [[]], [None]]
VALUES += [{"a": 1}, [1, 2], ["x"], 1e308, -1e308, 10**30, 2**31, 2**63, "\0", "x" * 100_000]
VALUES += ["(([a-z0-9._]+)+)+!", "(", "(" * 5000, ["(a*)*" * 40], {"(.*)*!": 1}, {"": 0}]
VALUES += ["<NaN>", "<Infinity>", "<1e999>", f"<{'9' * 5000}>", f"<{'[' * 50_000}>", "<>", "\ud800"]
VALUES += [list(range(1000)), {str(i): i for i in range(1000)}]


def mutate(folder: Path, rng: random.Random) -> str:
    """Changes something in a folder; returns what, for a report."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    readable = [path for path in files if json_of(path) is not None]
    if (manifest := folder / "metadata" / "metadata") in files and rng.random() < 0.5:
        file, readable = manifest, [manifest]  # of the many files of Orbax, the one with it all
    kind = rng.choices(("bytes", "json", "place"), (4, 5, 2))[0]
    if kind == "json" and readable:
        file = rng.choice(readable)
        said = change_json(file, rng)
    elif kind == "place":
        said = replace(rng.choice([file, rng.choice(sorted(folder.rglob("*")))]), rng, files)
    else:
        said = change_bytes(file, rng)
    return f"{file.relative_to(folder)}: {said}"


def change_bytes(file: Path, rng: random.Random) -> str:
    """Changes bytes of a file."""
    data = bytearray(file.read_bytes())
    size = len(data)
    at, end = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    if rng.random() < 0.5:  # headers and texts are at the start
        at = rng.randrange(min(size, 400) + 1)
        end = min(size, at + rng.randrange(1, 40))
    kind = rng.choice(
        ("flip", "flip", "flip", "truncate", "zero", "random", "cut", "twice", "grow")
    )
    if kind == "flip" and size:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[min(at, size - 1)] ^= 1 << rng.randrange(8)
            at = rng.randrange(size)
    elif kind == "truncate":
        del data[at:]
    elif kind == "zero":
        data[at:end] = bytes(end - at)
    elif kind == "random":
        data[at:end] = rng.randbytes(end - at)
    elif kind == "cut":
        del data[at:end]
    elif kind == "twice":
        data[at:at] = data[at:end]
    else:
        data += rng.randbytes(rng.choice((1, 8, 4096)))
    file.write_bytes(bytes(data))
    return f"{kind} at {at} to {end} of {size}"


def replace(path: Path, rng: random.Random, files: list[Path]) -> str:
    """Puts something else in the place of a file or folder."""
    kind = rng.choice(("removed", "folder", "pipe", "zero", "loop", "nowhere", "other", "pointer"))
    content = rng.choice(files).read_bytes()
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other":
        path.write_bytes(content)
    elif kind == "pointer":
        path.write_text(LFS_POINTER)
    elif kind != "removed":
        targets = {"zero": "/dev/zero", "loop": path.name, "nowhere": "no_such_file"}
        path.symlink_to(targets[kind])
    return f"{kind} in place of {path.name}"


def json_of(file: Path) -> Any:
    """Returns the JSON in a file or in its header; None if there is none."""
    data = file.read_bytes()
    try:
        if file.suffix == ".safetensors":
            return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return json.loads(data)
    except ValueError:
        return None


def write_json(file: Path, value: Any, *, signed: bool) -> None:
    """Writes a JSON value over that of `json_of`; a manifest gets the checksum of its content."""
    if signed and isinstance(value, dict) and "sha256" in value:
        content = {name: inner for name, inner in value.items() if name != "sha256"}
        value = {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    text = json.dumps(value)
    for raw in (value for value in VALUES if isinstance(value, str) and value.startswith("<")):
        text = text.replace(json.dumps(raw), raw[1:-1])
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        rest = data[8 + int.from_bytes(data[:8], "little") :]
        data = len(text).to_bytes(8, "little") + text.encode() + rest
    else:
        data = text.encode()
    file.write_bytes(data)


def change_json(file: Path, rng: random.Random) -> str:
    """Changes a value, or a key, somewhere in the JSON of a file."""
    value = json_of(file)
    places = list(walk(value))
    holder, key = rng.choice(places) if places else (None, None)
    signed = rng.random() < 0.8
    if holder is None or rng.random() < 0.03:
        write_json(file, new := rng.choice(VALUES), signed=signed)
        return f"all is {new!r:.40}"
    changes: list[Callable[[], str]] = [
        *[lambda: put(holder, key, rng.choice(VALUES))] * 6,
        lambda: drop(holder, key),
        lambda: rename(holder, key, rng),
        lambda: swap(holder, key, *rng.choice(places)),
        lambda: add(holder, rng),
    ]
    said = rng.choice(changes)()
    write_json(file, value, signed=signed)
    return f"{key!r:.60} {said}{', signed' if signed else ''}"


def walk(value: Any) -> list[tuple[Any, Any]]:
    """Returns every place in a JSON value: the object or list that holds it, and its key."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [place for key in keys for place in ((value, key), *walk(value[key]))]


def put(holder: Any, key: Any, value: Any) -> str:
    holder[key] = value
    return f"is {value!r:.40}"


def drop(holder: Any, key: Any) -> str:
    del holder[key]
    return "dropped"


def rename(holder: Any, key: Any, rng: random.Random) -> str:
    if isinstance(holder, list):
        holder.append(holder[key])
        return "twice"
    new = rng.choice(
        (f"{key}s", key[1:], key.upper(), f"{key}/x", "", "\0", "x" * 5000, "a." * 3000)
    )
    holder[new] = holder.pop(key)
    return f"renamed {new!r:.40}"


def swap(holder: Any, key: Any, other: Any, place: Any) -> str:
    one, two = json.loads(json.dumps((holder[key], other[place])))
    holder[key], other[place] = two, one
    return f"swapped with {place!r:.60}"


def add(holder: Any, rng: random.Random) -> str:
    value = rng.choice(VALUES)
    if isinstance(holder, list):
        holder.append(value)
    else:
        holder["unknown_field"] = value
    return f"has {value!r:.40} beside it"
