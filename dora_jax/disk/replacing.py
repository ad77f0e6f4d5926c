"""Folders that are written whole, and take the place of an older version in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from dora_jax.disk.full import full_disk
from dora_jax.disk.locks import is_being_replaced, is_still, locked, opened
from dora_jax.errors import CheckpointError

# A folder with more entries besides the version that is replaced is not copied, not even by links.
_MANY = 1000
# Threads of a writer that failed end within this time.
_PATIENCE_SECONDS = 2.0
# The old version stays so long for programs that know nothing of locks and have just opened it.
_GRACE_SECONDS = 0.02


@contextlib.contextmanager
def written_whole(
    target: pathlib.Path, *, own: Callable[[str], bool], overwrite: bool
) -> Iterator[pathlib.Path]:
    """Yields an empty folder, which takes the place of another if the block raises nothing.

    Entries of the old folder that are not part of the old version stay. Linux and macOS exchange
    the two folders in one step. Where the file system cannot, the old one is renamed and then the
    new one: for that moment a reader finds none. In a mount point, a folder of others, or one that
    holds much besides, the entries are replaced one by one.

    Args:
      target: the folder to write, from `target_folder`; it may not exist yet.
      own: whether an entry of the old folder, by its name, is part of the old version.
      overwrite: whether there may be an old version.

    Raises:
      CheckpointError: the disk is full; or another process wrote the folder meanwhile.
    """
    inside = target.is_dir() and not (_may_write(target.parent) and not os.path.ismount(target))
    try:
        with _made(target.parent), _stage(target, inside=inside) as stage:
            new = stage / "new"
            new.mkdir()
            yield new
            if target.exists():
                shutil.copymode(target, new)
            _put(new, target, own, overwrite=overwrite)
    except Exception as error:
        if (full := full_disk(target, error)) is None:
            raise
        raise full from None


def _put(
    new: pathlib.Path, target: pathlib.Path, own: Callable[[str], bool], *, overwrite: bool
) -> None:
    """Moves a complete folder to its place."""
    if not target.exists() and not is_being_replaced(target):
        try:
            new.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    with opened(target, exclusive=True):
        there = {name for name in os.listdir(target) if target / name != new.parent}
        if not overwrite and any(map(own, there)):
            raise CheckpointError(
                f"{target} was written by another process meanwhile: choose another folder"
            )
        if target in new.parents or not _may_be_copied(target, own):
            _put_entries(new, target, own)
            return
        _link_others(target, new, own)
        for put in (_exchange, _put_renamed):
            with contextlib.suppress(OSError):
                put(new, target)
                break
        else:
            _put_entries(new, target, own)
            return
    time.sleep(_GRACE_SECONDS)
    if new.exists():  # what came into the old folder since the others were linked
        for name in os.listdir(new):
            if not own(name) and not (target / name).exists():
                (new / name).rename(target / name)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Exchanges two folders in one step.

    Raises:
      OSError: the system or the file system cannot.
    """
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*paths, 2)  # RENAME_SWAP
    elif hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD
        failed = library.renameat2(here, paths[0], here, paths[1], 2)  # RENAME_EXCHANGE
    else:
        raise OSError(errno.ENOSYS, "folders cannot be exchanged", str(other))
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def _put_renamed(new: pathlib.Path, target: pathlib.Path) -> None:
    """Renames the old folder, and then the new one."""
    old = new.with_name("old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise


def _put_entries(new: pathlib.Path, target: pathlib.Path, own: Callable[[str], bool]) -> None:
    """Replaces the entries of a folder one by one.

    So it is done for mount points, in folders of others, and where a folder holds much besides.
    """
    old = new.with_name("old-entries")
    old.mkdir()
    names = set(os.listdir(new))
    for name in sorted(names):
        if (target / name).is_dir():
            (target / name).rename(old / name)
        (new / name).replace(target / name)
    for name in sorted(set(os.listdir(target)) - names):
        if own(name) and target / name != new.parent:
            (target / name).rename(old / name)


def _may_be_copied(folder: pathlib.Path, own: Callable[[str], bool]) -> bool:
    """Whether a folder holds little besides a version, and that on the same disk."""
    found, device = 0, folder.stat().st_dev
    for path, folders, files in os.walk(folder):
        if pathlib.Path(path) == folder:
            folders[:] = [name for name in folders if not own(name)]
        found += len(folders) + len(files)
        if found > _MANY or os.stat(path).st_dev != device:
            return False
    return True


def _link_others(old: pathlib.Path, new: pathlib.Path, own: Callable[[str], bool]) -> None:
    """Gives a new version what the folder of the old one holds besides it."""
    for entry in list(os.scandir(old)):
        target = new / entry.name
        if own(entry.name) or os.path.lexists(target):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, target, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


# Folders in the making.


@contextlib.contextmanager
def _made(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and those around it; removes them again if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process uses them
            for path in made:
                path.rmdir()
        raise


@contextlib.contextmanager
def _stage(target: pathlib.Path, *, inside: bool) -> Iterator[pathlib.Path]:
    """Yields a folder of this process alone, locked; removes it, and those of killed processes."""
    parent, prefix = (target if inside else target.parent), f".{target.name}."
    _remove_leftovers(parent, prefix, target)
    while True:
        stage = pathlib.Path(tempfile.mkdtemp(".partial", prefix, parent))
        with opened(stage, exclusive=True, in_place=False) as descriptor:
            if not stage.is_dir() or (descriptor and not is_still(stage, descriptor)):
                continue  # taken for a leftover before it was locked
            try:
                yield stage
            finally:
                remove_folder(stage)
            return


def remove_folder(folder: pathlib.Path) -> None:
    """Removes a folder, into which threads of a writer that failed may still be writing."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)


def _remove_leftovers(parent: pathlib.Path, prefix: str, target: pathlib.Path) -> None:
    form = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}\.partial")
    for name in filter(form.fullmatch, os.listdir(parent)):
        with contextlib.suppress(OSError), _owned(parent / name) as leftover:
            if leftover is None:
                continue
            if (leftover / "old").exists() and not target.exists():
                (leftover / "old").rename(target)  # killed between two renames
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _owned(folder: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """Yields a folder whose process has ended; None if that is not known."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield folder if locked(descriptor, exclusive=True, patience=0.0) else None
    finally:
        os.close(descriptor)


def _may_write(folder: pathlib.Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
