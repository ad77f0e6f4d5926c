"""Damage to a PEFT adapter folder is an error that names the file or the tensor."""

from __future__ import annotations

import json
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest

import dora_jax as dora
from dora_jax.names import IDENTITY
from dora_jax.peft import PeftError, read_adapters, save_pretrained
from tests.peft.small_models import (
    UP,
    adapted,
    assert_trees_equal,
    drop_digest,
    edit_tensors,
    fields_of,
    plain,
)
from tests.support.peft_models import FIXTURES, TWINS, build, reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(up_=t.pop(UP + "lora_A.weight")), "does not start with"),
        (lambda t: t.pop(UP + "lora_magnitude_vector"), "lora_magnitude_vector is missing"),
        (lambda t: t.pop(UP + "lora_A.weight"), "up.lora_A.weight is missing"),
        (lambda t: t.pop(UP + "lora_B.weight"), "up.lora_B.weight is missing"),
        (
            lambda t: t.update(
                {
                    UP + "lora_embedding_A": t.pop(UP + "lora_A.weight"),
                    UP + "lora_embedding_B": t.pop(UP + "lora_B.weight"),
                }
            ),
            "up.lora_A.weight is missing, although the layer is linear here",
        ),
        (
            lambda t: t.update({UP + "lora_embedding_A": t[UP + "lora_A.weight"]}),
            "up.lora_embedding_B is missing",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(UP)], "no adapter of it"),
        (
            lambda t: t.update({UP + "lora_C": t[UP + "lora_A.weight"]}),
            "up.lora_C is not one of the tensors that are read",
        ),
        (
            lambda t: t.update({UP + "other": t[UP + "lora_A.weight"]}),
            "up.other is neither part of an adapter",
        ),
        (
            lambda t: t.update({UP + "lora_A.weight": t[UP + "lora_A.weight"][:, :4].copy()}),
            "lora_A.weight has shape (2, 4), the model needs (2, 5)",
        ),
        (
            lambda t: t.update({UP + "lora_A.weight": t[UP + "lora_A.weight"].T.copy()}),
            "lora_A.weight has shape (5, 2), but r",
        ),
        (
            lambda t: t.update({UP + "lora_B.weight": t[UP + "lora_B.weight"].T.copy()}),
            "lora_B.weight has shape (2, 8), but r",
        ),
        (
            lambda t: t.update(
                {
                    UP + "lora_B.weight": t[UP + "lora_B.weight"][:7].copy(),
                    UP + "lora_magnitude_vector": np.ones(7, np.float32),
                }
            ),
            "lora_B.weight has shape (7, 2), the model needs (8, 2)",
        ),
        (
            lambda t: t.update({UP + "lora_magnitude_vector": np.ones(7, np.float32)}),
            "lora_magnitude_vector has 7 features, lora_B has 8",
        ),
        (
            lambda t: t.update({UP + "lora_magnitude_vector": np.ones((1, 8), np.float32)}),
            "has shape (1, 8), the model needs (8,)",
        ),
        (lambda t: t[UP + "lora_B.weight"].fill(np.nan), "lora_B.weight holds NaN or infinity"),
        (
            lambda t: t[UP + "lora_B.weight"][:1].fill(-np.inf),
            "lora_B.weight holds NaN or infinity",
        ),
        (lambda t: t.update({UP + "lora_A.weight": np.ones((2, 5), np.int8)}), "is of I8"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(tmp_path, change, message):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    edit_tensors(tmp_path, change)
    with pytest.raises(PeftError, match=re.escape(message)):
        read_adapters(plain(), tmp_path, IDENTITY)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_truncated_or_missing_file_is_refused(tmp_path, file):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    base, data = plain(), (tmp_path / file).read_bytes()
    for length in np.linspace(0, len(data) - 1, 20, dtype=int):
        (tmp_path / file).write_bytes(data[:length])
        with pytest.raises(PeftError, match=re.escape(file)):
            read_adapters(base, tmp_path, IDENTITY)
    (tmp_path / file).unlink()
    with pytest.raises(PeftError, match=re.escape(file)):
        read_adapters(base, tmp_path, IDENTITY)


def test_a_pickle_is_refused_and_not_opened(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    (tmp_path / "adapter_model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "opened",))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(PeftError, match=r"adapter_model.bin is a pickle, which can run any code"):
        read_adapters(plain(), tmp_path, IDENTITY)
    assert not (tmp_path / "opened").exists()


def header_of(folder):
    """Returns the header of a folder's tensors."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def flips(folder, count):
    """Flips one bit at several places of the config and the header, one after another."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    config = len((folder / "adapter_config.json").read_bytes())
    random = np.random.default_rng(0)
    for place in np.linspace(0, config + header - 1, count, dtype=int):
        name = "adapter_config.json" if place < config else "adapter_model.safetensors"
        original = (folder / name).read_bytes()
        damaged = bytearray(original)
        damaged[place if place < config else place - config] ^= 1 << int(random.integers(8))
        (folder / name).write_bytes(damaged)
        yield
        (folder / name).write_bytes(original)


COUNTS = pytest.mark.parametrize("count", [50, pytest.param(400, marks=pytest.mark.full)])


@COUNTS
def test_a_flipped_bit_is_an_error_or_changes_nothing_that_counts(tmp_path, count):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    base, fields, header = plain(), fields_of(tmp_path), header_of(tmp_path)
    tree, config = read_adapters(base, tmp_path, IDENTITY)
    errors = 0
    for _ in flips(tmp_path, count):
        try:
            other_tree, other_config = read_adapters(base, tmp_path, IDENTITY)
        except dora.DoRAError:
            errors += 1
            continue
        assert other_config == config
        assert_trees_equal(other_tree, tree)
        other_fields, other_header = fields_of(tmp_path), header_of(tmp_path)
        changed = {k for k in fields | other_fields if fields.get(k) != other_fields.get(k)}
        # White space; an ignored field; a field that was at its default; the metadata.
        assert all(fields.get(k) in (None, False, True, {}) for k in changed), changed
        assert {k: v for k, v in header.items() if k != "__metadata__"} == {
            k: v for k, v in other_header.items() if k != "__metadata__"
        }
    assert errors > 0.7 * count, errors


def test_a_bit_flipped_in_a_number_is_noticed(tmp_path):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    file = tmp_path / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(PeftError, match="digest"):
        read_adapters(plain(), tmp_path, IDENTITY)
    drop_digest(tmp_path)
    read_adapters(plain(), tmp_path, IDENTITY)


@COUNTS
def test_pefts_files_have_no_digest_so_that_a_digit_may_change_unseen(tmp_path, count):
    shutil.copytree(FIXTURES / "attention", tmp_path, dirs_exist_ok=True)
    built = build(TWINS["attention"], reference("attention", "base."), {})
    tree, config = built.read(tmp_path)
    unseen = set()
    for _ in flips(tmp_path, count):
        try:
            other_tree, other = built.read(tmp_path)
        except dora.DoRAError:
            continue
        assert_trees_equal(other_tree, tree)
        one, other = config.to_dict(), other.to_dict()
        unseen |= {name for name in one if one[name] != other[name]}
    assert unseen <= {"alpha", "dropout"}
