"""A folder that is replaced is one of two whole versions at any moment, to any reader."""

from __future__ import annotations

import errno
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import dora_jax as dora
from dora_jax.checkpoint import read_adapters, save
from dora_jax.disk import read_in_one_piece, replacing, target_folder, unchanged, written_whole
from dora_jax.errors import CheckpointError
from tests.support.disk import full_disk

PARTS = ("a", "b", "c")


def write(folder, version, overwrite=True, parts=PARTS):
    target = target_folder(folder)
    with written_whole(target, own=lambda name: len(name) == 1, overwrite=overwrite) as new:
        for part in parts:
            (new / part).write_text(f"{version}{'.' * 2000}")


def version(folder, wait=0.0):
    def read():
        texts = []
        for path in sorted(folder.glob("?")):
            texts.append(path.read_text())
            time.sleep(wait)
        if len(set(texts)) != 1 or len(texts[0]) < 2000:
            raise CheckpointError(f"a mix: {[text[:5] for text in texts]}")
        return int(texts[0].rstrip("."))

    return read_in_one_piece(folder, read)


def no_exchange(*_):
    raise OSError(errno.EINVAL, "the file system cannot")


@pytest.mark.parametrize("exchange", [True, False])
def test_two_writers_and_their_readers_each_see_a_whole_version(tmp_path, monkeypatch, exchange):
    other = ("_put_renamed", lambda *_: pytest.fail("not in one step"))
    monkeypatch.setattr(replacing, *(other if exchange else ("_exchange", no_exchange)))
    folder, link = tmp_path / "folder", tmp_path / "link"
    link.symlink_to("folder")
    write(folder, 0)
    seen, failures, done = set(), [], threading.Event()

    def guarded(run, *args):
        try:
            run(*args)
        except Exception as error:
            failures.append(error)
            done.set()

    def writer(path, first):
        for number in range(first, first + 25):
            write(path, number)

    def reader(path):
        while not done.is_set():
            seen.add(version(path))
            assert path.is_dir() or not exchange  # to a reader who knows nothing of locks, too
            time.sleep(0.001)

    readers = [threading.Thread(target=guarded, args=(reader, path)) for path in (folder, link)]
    writers = [
        threading.Thread(target=guarded, args=(writer, path, first))
        for path, first in ((folder, 100), (link, 200))
    ]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not failures and seen <= {0, *range(100, 125), *range(200, 225)}
    assert version(folder) in (124, 224) and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_what_is_read_while_a_writer_does_not_wait_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("dora_jax.disk.locks._PATIENCE_SECONDS", 0.0)
    folder, numbers = tmp_path / "folder", iter(range(1, 10))
    write(folder, 0)

    def read():
        texts = [(folder / "a").read_text()]
        if (number := next(numbers)) < 3:
            write(folder, number)
        return [*texts, (folder / "b").read_text()]

    one, other = read_in_one_piece(folder, read)
    assert one == other and one.startswith("2.")
    with pytest.raises(CheckpointError, match="was replaced while"), unchanged(folder):
        write(folder, 10)


def test_a_writer_waits_for_a_reader_and_a_reader_for_a_folder_between_two_renames(tmp_path):
    folder, old = tmp_path / "folder", tmp_path / ".folder.abcdefgh.partial" / "old"
    write(folder, 0)
    writer = threading.Thread(target=write, args=(folder, 1))
    with unchanged(folder):
        writer.start()
        writer.join(0.1)
        assert version(folder) == 0
    writer.join()
    assert version(folder) == 1
    old.parent.mkdir()
    folder.rename(old)
    later = threading.Timer(0.05, old.rename, [folder])
    later.start()
    assert version(folder) == 1
    later.join()


def test_what_a_killed_writer_left_is_removed_by_the_next_and_by_no_other(tmp_path):
    folder = tmp_path / "folder"
    write(folder, 0)
    for aside in (".folder.abcdefgh.partial", ".folder.mine.partial", ".other.abcdefgh.partial"):
        (tmp_path / aside / "new").mkdir(parents=True)
    target = target_folder(folder)
    with written_whole(target, own=lambda _: True, overwrite=True) as new:
        write(folder, 1)  # does not take the other's folder for a leftover
        (new / "a").write_text("2")
    assert [p.read_text() for p in folder.iterdir()] == ["2"]
    left = {".folder.mine.partial", ".other.abcdefgh.partial"}
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *left}


def test_a_writer_killed_between_two_renames_loses_nothing(tmp_path):
    old = tmp_path / ".folder.abcdefgh.partial" / "old"
    write(old, 7)
    folder = tmp_path / "folder"
    whole = written_whole(folder, own=lambda _: True, overwrite=True)
    with pytest.raises(ZeroDivisionError), whole:
        raise ZeroDivisionError
    assert version(folder) == 7


@pytest.mark.parametrize("many", [1000, 0], ids=["exchanged", "entry by entry"])
def test_other_entries_of_the_folder_stay(tmp_path, monkeypatch, many):
    monkeypatch.setattr(replacing, "_MANY", many)
    folder, exchange = tmp_path / "folder", replacing._exchange

    def checked(new, target):
        exchange(new, target)
        assert target != folder or (folder / "nested" / "a").exists(), "not at once"

    monkeypatch.setattr(replacing, "_exchange", checked)
    write(folder, 0, parts="abcd")
    (folder / "notes.txt").write_text("mine")
    write(folder / "nested", 5)
    (folder / "link").symlink_to("notes.txt")
    folder.chmod(0o700)
    write(folder, 1, parts="ab")
    names = ["a", "b", "link", "nested", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert version(folder) == 1 and version(folder / "nested") == 5
    assert (folder / "link").readlink() == pathlib.Path("notes.txt")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_version_that_came_meanwhile_is_not_replaced_unasked(tmp_path):
    folder = tmp_path / "new" / "folder"
    whole = written_whole(folder, own=lambda _: True, overwrite=False)
    with pytest.raises(CheckpointError, match="another process"), whole as new:
        (new / "a").write_text("1")
        write(folder, 2)
    assert version(folder) == 2
    whole = written_whole(tmp_path / "deep" / "er" / "folder", own=bool, overwrite=False)
    with pytest.raises(ZeroDivisionError), whole:
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_paths_of_unset_variables_and_of_inputs_are_refused(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to("here/a")
    (here / "a").mkdir()
    (here / "file").write_text("")
    for folder, inputs, message in (
        ("", (), "empty"),
        (" ", (), "empty"),
        (".", (), "the current folder"),
        (pathlib.Path(), (), "the current folder"),
        ("/", (), "the current folder"),
        ("..", (), "the current folder"),
        ("a", ["a"], "is read from"),
        ("a", [here / "b" / ".." / "a"], "is read from"),
        (tmp_path / "link", ["b", "a"], "is read from"),
        ("a", [tmp_path / "link"], "is read from"),
        ("file", (), "is a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            target_folder(folder, *inputs)


LAYER = {
    "lora_a": np.random.default_rng(0).random((64, 8), np.float32),
    "lora_b": np.random.default_rng(1).random((8, 4000), np.float32),
    "magnitude": np.ones(4000, np.float32),
}


# A thread of TensorStore may come too late to an event loop that ended with the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_on_a_full_disk_the_old_version_stays_and_nothing_is_left(tmp_path, caplog):
    config, small = dora.DoRAConfig(rank=8), dora.DoRAConfig(rank=0)
    folder, run = tmp_path / "adapter", tmp_path / "run"
    save(folder, small, {"layer": {"magnitude": np.ones(3, np.float32)}})
    with dora.Checkpoints(run, small) as checkpoints:
        checkpoints.save(1, {"layer": {"magnitude": np.ones(3, np.float32)}})
    with full_disk(20_000):
        with pytest.raises(CheckpointError, match="adapter cannot be written: File too large"):
            save(folder, config, {"layer": LAYER}, overwrite=True)
        checkpoints = dora.Checkpoints(run, config)
        with pytest.raises(CheckpointError, match="run cannot be written: File too large"):
            checkpoints.save(2, {"layer": LAYER})
            checkpoints.wait()
        checkpoints.close()
    assert read_adapters(folder).config == small and not caplog.records
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "run"}
    assert [path.name for path in run.iterdir()] == ["1"]


SAVING = """
import sys, numpy as np, dora_jax as dora
value = np.full(3, float(sys.argv[2]), np.float32)
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    adapters = {"layer": {"magnitude": value}}
    dora.save(sys.argv[1], dora.DoRAConfig(rank=0), adapters, overwrite=True)
"""


@pytest.mark.full
def test_two_processes_save_at_once_and_are_killed_while_a_third_reads(tmp_path):
    folder = tmp_path / "adapter"
    save(folder, dora.DoRAConfig(rank=0), {"layer": {"magnitude": np.ones(3, np.float32)}})
    command = [sys.executable, "-c", SAVING, str(folder)]
    processes = [
        subprocess.Popen([*command, str(n), "10000"], stdout=subprocess.PIPE) for n in (2, 3)
    ]
    try:
        for process in processes:
            process.stdout.readline()
        seen = []
        # On a busy machine one of the two may come late to its first save.
        while len(seen) < 100 or not {2, 3} <= set(seen):
            assert all(process.poll() is None for process in processes)
            (value,) = set(read_adapters(folder).adapters["layer"]["magnitude"].tolist())
            seen.append(value)
        assert set(seen) <= {1, 2, 3}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert set(read_adapters(folder).adapters["layer"]["magnitude"].tolist()) < {2, 3}
    subprocess.run([*command, "4", "1"], check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
