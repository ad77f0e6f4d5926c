"""Whatever stands in a file's place, reading ends soon, with an error that names the file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dora_jax.checkpoint import read_adapters
from dora_jax.cli import main
from dora_jax.errors import CheckpointError
from tests.fuzz.formats import FORMATS, whole
from tests.fuzz.mutations import LFS_POINTER, json_of, write_json
from tests.fuzz.runs import OURS, judge


def pipe(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


def folder(path):
    path.mkdir()


def pointer(path):
    path.write_text(LFS_POINTER)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """A whole folder of each format, and what is read from it."""
    found = {}
    for kind in FORMATS:
        path = tmp_path_factory.mktemp("whole") / "folder"
        kind.make(path)
        found[kind.name] = kind, path, whole(kind, path)
    return found


# Orbax writes some files that it does not read; these hold the adapter.
NEEDED = ("metadata/metadata", "manifest.ocdbt", "json", "safetensors")


OTHERS = [pytest.param(put, marks=pytest.mark.full) for put in (loop, folder, pointer)]


@pytest.mark.parametrize("put", [pipe, zeros, *OTHERS])
@pytest.mark.parametrize("name", ["own", "peft", "llama", "bert"])
def test_what_is_no_file_is_named(tmp_path, wholes, name, put):
    kind, path, right = wholes[name]
    files = (file for file in path.rglob("*") if str(file).endswith(NEEDED))
    needed = [file for file in files if "process_" not in file.parent.name]  # Orbax merges these
    assert needed
    for number, file in enumerate(needed):
        copy = tmp_path / str(number)
        shutil.copytree(path, copy)
        damaged = copy / file.relative_to(path)
        damaged.unlink()
        put(damaged)
        verdict, error = judge(kind, copy, right)
        assert verdict == "error", error
        assert damaged.name in error or f"{copy.name}/arrays" in error
        if put is pointer and name != "own":
            assert "git-LFS pointer" in error


@pytest.mark.parametrize("name", ["own", "peft", "llama", "bert"])
@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "y/" * 3000, "no_such_folder", __file__])
def test_a_path_that_is_no_folder_is_an_error(name, path):
    kind = next(kind for kind in FORMATS if kind.name == name)
    with pytest.raises(OURS, match=r"folder|missing") as caught:
        kind.read(Path(path))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("path", ["x" * 300, __file__])
def test_the_command_says_so_in_one_line(capsys, path):
    assert main(["inspect", path]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_names_of_files_in_an_index_are_checked(tmp_path, wholes):
    kind, path, right = wholes["llama"]
    for number, file in enumerate(("a\0b", "x" * 5000, "../config.json", "", 3, None)):
        copy = tmp_path / str(number)
        shutil.copytree(path, copy)
        index = copy / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = file
        index.write_text(json.dumps(content))
        verdict, error = judge(kind, copy, right)
        assert verdict == "error" and index.name in error


def test_metadata_that_is_null_is_named(tmp_path, wholes):
    for name in ("peft", "bert"):
        kind, path, right = wholes[name]
        copy = tmp_path / name
        shutil.copytree(path, copy)
        (file,) = copy.glob("*.safetensors")
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:end]) | {"__metadata__": None}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
        verdict, error = judge(kind, copy, right)
        assert verdict == "error" and f"{file.name} is damaged (__metadata__ must be" in error


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size must be a positive integer below 2^31"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"intermediate_size": 10**9}, "intermediate_size is 1000000000"),
        ({"num_hidden_layers": 10**4}, "holds 2 layers, but num_hidden_layers is 10000"),
        ({"hidden_size": 10**4, "num_attention_heads": 10}, "hidden_size is 10000"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_sizes_are_compared_with_the_weights_before_memory_is_taken(
    tmp_path, wholes, name, sizes, message
):
    kind, path, right = wholes[name]
    shutil.copytree(path, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    verdict, error = judge(kind, tmp_path / "copy", right)
    assert verdict == "error", error
    assert message in error and "config.json" in error


def test_a_rank_of_a_signed_manifest_is_compared_before_memory_is_taken(tmp_path, wholes):
    _, path, _ = wholes["own"]
    shutil.copytree(path, tmp_path / "copy")
    manifest = tmp_path / "copy" / "metadata" / "metadata"
    content = json_of(manifest)
    content["metadata"]["config"]["rank"] = 10**12
    write_json(manifest, content, signed=True)
    with pytest.raises(CheckpointError, match=r"lora_a has shape .* makes its rank 10{12}"):
        read_adapters(tmp_path / "copy")
