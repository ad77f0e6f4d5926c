"""Damaged and incomplete checkpoints of a run: skipped with a warning, never taken for good."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest

from dora_jax.checkpoint import Checkpoints
from dora_jax.checkpoint.step import read_step
from dora_jax.errors import CheckpointError
from tests.checkpoint.runs import CONFIG, assert_same, everything, nnx_run


def damage(folder, kind, rng, first):
    """Damages the checkpoint in a folder in one of several ways."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    # Some of Orbax's files are not needed to read; the first draw is one that is.
    file = folder / "metadata" / "metadata" if first else rng.choice(files)
    content = file.read_bytes()
    if kind == "removed":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: rng.randrange(max(1, len(content)))])
    elif kind == "flipped" and content:
        at = rng.randrange(len(content))
        file.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
    elif kind == "folder":
        folders = sorted(p for p in folder.rglob("*") if p.is_dir())
        shutil.rmtree(folder / "arrays" if first else rng.choice(folders))
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


# The checkpoints of one kind of damage are read in the two ways that Orbax has, with metrics and
# without. By default one drawn damage of each kind, after the one that is certain to matter.
DAMAGES = [
    ("removed", "loss", 2),
    *((kind, None, 2) for kind in ("removed", "truncated", "flipped", "folder")),
    ("empty", None, 1),
]
MANY_DAMAGES = [
    (kind, best, 1 if kind == "empty" else 6)
    for kind in ("removed", "truncated", "flipped", "folder", "empty")
    for best in (None, "loss")
]


@pytest.mark.rows(2)
@pytest.mark.parametrize(
    ("kind", "best", "draws"),
    [*DAMAGES, *(pytest.param(*row, marks=pytest.mark.full) for row in MANY_DAMAGES)],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    saved, tmp_path, trained, kind, best, draws
):
    rng, found = random.Random(f"{kind}{best}"), set()
    for number in range(draws):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        damage(folder / "4", kind, rng, first=number == 0)
        left = listing(folder)
        model, optimizer = nnx_run()
        with Checkpoints(folder, CONFIG, best=best) as checkpoints:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step = checkpoints.restore(model, optimizer).step
            assert_same(everything(model, optimizer), trained[step])
            said = [str(w.message) for w in caught if "skipping" in str(w.message)]
            assert bool(said) == (step == 2) and all(str(folder / "4") in text for text in said)
            assert checkpoints.latest_step() == step
            assert listing(folder) == left  # another process may be the one that writes
            # The resumed run saves the step anew, and keeps the damaged one under another name.
            if step == 2:
                checkpoints.save(4, model, optimizer, metrics={"loss": 0.5})
                checkpoints.wait()
                assert checkpoints.steps() == [2, 4]
                assert (folder / "damaged-4-0").is_dir()
                assert checkpoints.restore(model, optimizer).step == 4
        found.add(step)
    assert 2 in found


def listing(folder):
    return sorted(folder.rglob("*"))


def test_where_no_checkpoint_is_good_nothing_is_made_up(run_folder):
    model, optimizer = nnx_run()
    before = everything(model, optimizer)
    for step in (2, 4):
        shutil.rmtree(run_folder / str(step) / "arrays")
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        with (
            pytest.warns(UserWarning, match="skipping"),
            pytest.raises(CheckpointError, match=r"none of the checkpoints is good.*/4"),
        ):
            checkpoints.restore(model, optimizer)
        with pytest.raises(CheckpointError, match="/2/arrays is damaged or incomplete"):
            checkpoints.restore(model, optimizer, step=2)
    assert_same(everything(model, optimizer), before)


def test_an_incomplete_checkpoint_is_none(run_folder, trained):
    left = run_folder / "6.orbax-checkpoint-tmp-1790000000000000000"
    shutil.copytree(run_folder / "4", left)
    shutil.rmtree(left / "arrays")
    model, optimizer = nnx_run()
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.restore(model, optimizer).step == 4
        assert left.exists()  # another process might be writing it
        assert_same(everything(model, optimizer), trained[4])
        checkpoints.save(6, model, optimizer)
        checkpoints.wait()
        assert not left.exists() and checkpoints.steps() == [4, 6]


def first_entry(content):
    return next(iter(content["arrays"].values()))


FORGED = {
    "arrays is a list": lambda c: c.update(arrays=[]),
    "an entry is null": lambda c: c["arrays"].update({next(iter(c["arrays"])): None}),
    "no shape": lambda c: first_entry(c).pop("shape"),
    "a shape of text": lambda c: first_entry(c).update(shape="3"),
    "no dtype": lambda c: first_entry(c).pop("dtype"),
    "a checksum of text": lambda c: first_entry(c).update(sha256="x"),
    "an array inside another": lambda c: c["arrays"].update(
        {f"{next(iter(c['arrays']))}/x": dict(first_entry(c))}
    ),
    "a name without end": lambda c: c["arrays"].update({"a/" * 9999: dict(first_entry(c))}),
    "another part": lambda c: c["arrays"].update(
        {f"x/{next(iter(c['arrays']))}": c["arrays"].pop(next(iter(c["arrays"])))}
    ),
    "a key of no kind": lambda c: [
        e.update(key="x") for e in c["arrays"].values() if e.get("key") is not None
    ],
    "no norm": lambda c: [
        c["arrays"].pop(name) for name in list(c["arrays"]) if name.endswith("/norm")
    ],
    "an unknown record": lambda c: [
        c["arrays"].update({name.replace("norm", "norn"): c["arrays"].pop(name)})
        for name in list(c["arrays"])
        if name.endswith("/norm")
    ],
    "metadata is a list": lambda c: c.update(metadata=[]),
    "metadata is no base64": lambda c: c["metadata"].update(data={"bytes": "x"}),
    "no step": lambda c: c["metadata"].pop("step"),
    "no data": lambda c: c["metadata"].pop("data"),
    "the step of another": lambda c: c["metadata"].update(step=400),
    "a step of text": lambda c: c["metadata"].update(step="4"),
}


def forge(folder, name):
    """Changes the manifest of a step, and gives it the checksum of what it now holds."""
    file = folder / "metadata" / "metadata"
    content = json.loads(file.read_text())
    del content["sha256"]
    FORGED[name](content)
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    file.write_text(json.dumps({**content, "sha256": digest}))


def test_a_forged_manifest_is_named(run_folder):
    whole = (run_folder / "4" / "metadata" / "metadata").read_text()
    for name in FORGED:
        (run_folder / "4" / "metadata" / "metadata").write_text(whole)
        forge(run_folder / "4", name)
        with pytest.raises(CheckpointError, match=str(run_folder / "4")):
            read_step(run_folder / "4", with_state=True)


SOME = ["no dtype", "the step of another"]
OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in FORGED if name not in SOME]


@pytest.mark.parametrize("name", [*SOME, *OTHERS])
def test_a_checkpoint_whose_manifest_is_forged_is_skipped_for_the_one_before(
    run_folder, trained, name
):
    forge(run_folder / "4", name)
    model, optimizer = nnx_run()
    with (
        Checkpoints(run_folder, CONFIG) as checkpoints,
        pytest.warns(UserWarning, match=f"skipping.*{run_folder / '4'}"),
    ):
        assert checkpoints.restore(model, optimizer).step == 2
    assert_same(everything(model, optimizer), trained[2])


def test_what_orbax_would_wait_for_or_choke_on_is_named(run_folder, tmp_path):
    for name in ("commit_success.txt", "metadata/metadata"):
        file = run_folder / "4" / name
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            Checkpoints(run_folder, CONFIG)
        file.unlink()
        file.write_bytes(content)
    file = run_folder / "4" / "metrics" / "metrics"
    file.parent.mkdir()
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"metrics is not valid JSON.*remove .*/4"):
        Checkpoints(run_folder, CONFIG, best="loss")
    for path in (file, "a\0b", "x" * 300):
        with pytest.raises(CheckpointError, match="folder"):
            Checkpoints(path, CONFIG)


@pytest.mark.parametrize("text", ["{}", pytest.param('{"loss": "x"}', marks=pytest.mark.full)])
def test_a_step_whose_metric_is_lost_counts_as_the_worst(tmp_path, text):
    model, _ = nnx_run()
    with Checkpoints(tmp_path, CONFIG, best="loss", keep=1) as checkpoints:
        checkpoints.save(2, model, metrics={"loss": 2.0})
        checkpoints.save(4, model, metrics={"loss": 1.0})
    (tmp_path / "4" / "metrics" / "metrics").write_text(text)
    with Checkpoints(tmp_path, CONFIG, best="loss", keep=1) as checkpoints:
        checkpoints.save(6, model, metrics={"loss": 6.0})
        checkpoints.save(8, model, metrics={"loss": 8.0})
        checkpoints.wait()
        assert checkpoints.steps() == [6, 8]
