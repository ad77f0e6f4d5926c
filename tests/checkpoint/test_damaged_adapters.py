"""Damage to a folder of adapters, and edits of it: an error that names a file or an array.

Damage that does not matter may leave the result as it was. It never gives another result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time

import numpy as np
import pytest

import dora_jax as dora
from dora_jax.checkpoint import load, read_adapters, save
from dora_jax.cli import main
from dora_jax.errors import CheckpointError
from tests.checkpoint.chains import CONFIGS, assert_same, nnx_base, trained_nnx


def all_files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def outcome(folder, expected):
    """Returns "same" or "error"; anything else fails the test."""
    try:
        saved = read_adapters(folder)
    except dora.DoRAError as error:
        message = str(error)
        assert str(folder) in message or any(f in message for f in ("rank", "alpha", "field"))
        return "error"
    assert saved.config == expected.config
    assert_same(saved.adapters, expected.adapters)
    assert_same(
        {".".join(p): record.arrays() for p, record in saved.base.items()},
        {".".join(p): record.arrays() for p, record in expected.base.items()},
    )
    return "same"


@pytest.mark.parametrize("read", [read_adapters, lambda folder: main(["inspect", str(folder)])])
def test_what_is_damaged_is_one_error_without_a_word_of_threads_that_end_later(
    tmp_path, monkeypatch, read
):
    """TensorStore reads many arrays at once; Orbax ends with the first error."""
    layer = {"lora_a": np.ones((64, 2)), "lora_b": np.ones((2, 64)), "magnitude": np.ones(64)}
    save(tmp_path / "a", dora.DoRAConfig(rank=2), {f"layer{i}": layer for i in range(6)})
    (file,) = (tmp_path / "a" / "arrays" / "d").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: said.append(what.exc_value))
    monkeypatch.setattr(sys, "excepthook", lambda *what: said.append(what[1]))
    for _ in range(3):
        with contextlib.suppress(CheckpointError):
            assert read(tmp_path / "a") == 1
    time.sleep(0.3)
    assert not said


@pytest.mark.parametrize("flips", [1, pytest.param(6, marks=pytest.mark.full)])
def test_no_damage_to_a_file_passes_for_good(folder, tmp_path, flips):
    expected, rng, outcomes = read_adapters(folder), np.random.default_rng(0), {}
    copy = tmp_path / "copy"
    for name in all_files(folder):
        content = (folder / name).read_bytes()
        damaged = [b"", content[: len(content) // 2], content[:-1], content + b"\0", b"\0" * 64]
        for _ in range(flips):
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
        for new in [None, *damaged]:
            shutil.copytree(folder, copy)
            if new is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(new)
            outcomes.setdefault(str(name), []).append(outcome(copy, expected))
            shutil.rmtree(copy)
    # Every change of the manifest is an error, and most changes of the files with the arrays.
    assert set(outcomes["metadata/metadata"]) == {"error"}
    data = [n for n in outcomes if "/d/" in n]
    assert data and any(outcomes[n].count("error") > 5 for n in data)


def test_a_flipped_bit_of_a_number_is_noticed(tmp_path):
    rng, config = np.random.default_rng(0), dora.DoRAConfig(rank=8)
    shapes = {"lora_a": (256, 8), "lora_b": (8, 128), "magnitude": (128,)}
    layer = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save(tmp_path / "a", config, {"layer": layer})
    file = max((tmp_path / "a" / "arrays" / "d").iterdir(), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    for position in rng.integers(len(content), size=6):
        flipped = bytearray(content)
        flipped[position] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError, match="damaged"):
            read_adapters(tmp_path / "a")


def test_a_changed_setting_is_noticed(folder):
    file = folder / "metadata" / "metadata"
    assert '"alpha": 16.0' in file.read_text()
    file.write_text(file.read_text().replace('"alpha": 16.0', '"alpha": 17.0'))
    with pytest.raises(CheckpointError, match="does not match its own sha256"):
        load(folder, nnx_base())


def signed(content):
    """Returns a manifest with its right digest, as an editing tool would write it."""
    content = {k: v for k, v in content.items() if k != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def rename(content):
    content["arrays"]["adapters/layer_9/lora_a"] = content["arrays"].pop("adapters/layer_0/lora_a")


def rename_layer(content):
    for name in list(content["arrays"]):
        content["arrays"][name.replace("layer_0", "layer_9")] = content["arrays"].pop(name)


def drop_magnitude(content):
    del content["arrays"]["adapters/layer_0/magnitude"]


def swap(content):
    one, other = (content["arrays"][f"{k}"] for k in ("adapters/layer_0/magnitude", NORM))
    content["arrays"]["adapters/layer_0/magnitude"], content["arrays"][NORM] = other, one


def transpose(content):
    content["arrays"]["adapters/layer_0/lora_a"]["shape"].reverse()


def retype(content):
    content["arrays"]["adapters/layer_0/lora_a"]["dtype"] = "int32"


def newer(content):
    content["format"] = "dora_jax/2"


def unknown_field(content):
    content["metadata"]["config"]["ranks"] = 3


def no_config(content):
    del content["metadata"]["config"]


NORM = "base/layer_0/norm"


@pytest.mark.parametrize(
    "edit, message",
    [
        (rename, "layer_9"),
        (rename_layer, "layer_9"),
        (drop_magnitude, r"missing layer_0\.magnitude"),
        (swap, "array adapters/layer_0/magnitude is damaged"),
        (transpose, r"array adapters/layer_0/lora_a is float32 \(16, 3\).*float32 \(3, 16\)"),
        (retype, "array adapters/layer_0/lora_a is float32"),
        (newer, "dora_jax/2.*newer"),
        (unknown_field, r"unknown fields \['ranks'\]"),
        (no_config, "no configuration"),
    ],
)
def test_an_edited_manifest_does_not_load(folder, edit, message):
    file = folder / "metadata" / "metadata"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(signed(content)))
    with pytest.raises(dora.DoRAError, match=message):
        load(folder, nnx_base())


def test_other_arrays_under_the_same_names_do_not_load(folder, tmp_path):
    """Undamaged files of another adapter are not taken for those of this one."""
    config, model = CONFIGS["dora"], trained_nnx(CONFIGS["dora"])
    magnitude = np.array(model.layer_0.magnitude[...])
    magnitude[3] *= 1.0001
    model.layer_0.magnitude[...] = magnitude
    save(tmp_path / "other", model, config)
    shutil.rmtree(folder / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", folder / "arrays")
    with pytest.raises(CheckpointError, match="array adapters/layer_0/magnitude is damaged"):
        load(folder, nnx_base())


def test_a_folder_without_adapters_is_named(tmp_path):
    for make, message in (
        (lambda p: None, "is no folder"),
        (lambda p: p.mkdir(), "metadata is missing"),
        (lambda p: (p / "adapter_config.json").write_text("{}"), "metadata is missing"),
    ):
        make(tmp_path / "a")
        with pytest.raises(CheckpointError, match=message):
            read_adapters(tmp_path / "a")
