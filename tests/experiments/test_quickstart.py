"""The quickstart end to end on a tiny budget, whole and interrupted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from experiments import quickstart
from experiments.models.huggingface import load_bert
from experiments.tasks.metrics import read_metrics


def _adapter(folder: Path) -> dict[str, np.ndarray]:
    tree = dora.checkpoint.read_adapters(folder / "adapter").adapters
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_it_adapts_the_real_encoder_and_leaves_what_it_says(minilm, tmp_path, capsys):
    config = quickstart.Config(
        run_folder=tmp_path / "run", train_examples=64, epochs=1, max_length=16
    )
    summary = quickstart.run(config)
    assert summary["step_0_max_difference"] == 0.0
    assert summary["merge_max_difference"] <= 1e-5
    # 6 layers; 4 attention and 2 feed-forward projections; rank 8; a head of two classes
    factors = 6 * 8 * (4 * (384 + 384) + 2 * (384 + 1536))
    magnitudes = 6 * (4 * 384 + 1536 + 384)
    assert summary["trainable_parameters"]["lora_a"] + summary["trainable_parameters"][
        "lora_b"
    ] == pytest.approx(factors)
    assert summary["trainable_parameters"]["magnitude"] == magnitudes
    assert summary["trainable_parameters"]["saved"] == 2 * 384 + 2
    low, high = summary["test_accuracy_95"]
    assert low < summary["test_accuracy"] < high
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text())["jax"] == jax.__version__
    for picture in ("curves.png", "layers.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.*"))
    assert [m["split"] for m in read_metrics(folder)] == ["train", "train", "validation", "test"]
    printed = capsys.readouterr().out
    for text in ("Test accuracy", "95 %", "trainable parameters", str(folder), "Next:"):
        assert text in printed
    saved = dora.checkpoint.read_adapters(folder / "adapter").config
    assert saved.modules_to_save == ("classifier",)
    before, after = (
        dict(nnx.to_flat_state(nnx.state(load_bert(f)))) for f in (minilm, folder / "merged")
    )
    changed = {
        path for path, leaf in before.items() if not np.array_equal(leaf[...], after[path][...])
    }
    assert len(changed) == 36
    assert all(path[-1] == "kernel" for path in changed)


def test_an_interrupted_and_resumed_run_ends_bit_for_bit_like_an_unbroken_one(
    tiny_checkpoint, tmp_path
):
    settings = {
        "checkpoint": tiny_checkpoint,
        "train_examples": 320,
        "batch_size": 8,
        "epochs": 1,
        "checkpoint_every": 5,
        "max_length": 16,
        "dropout": 0.1,
    }
    whole = quickstart.Config(run_folder=tmp_path / "whole", **settings)
    quickstart.run(whole)

    broken = tmp_path / "broken"
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.quickstart", f"--run-folder={broken}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not _steps_written(broken) >= 12:
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline, "it did not get to step 12"
            time.sleep(0.01)
        process.kill()
    assert not (broken / "summary.json").exists()
    summary = quickstart.run(quickstart.Config(run_folder=broken, **settings))
    assert summary["resumed_from_step"] % 5 == 0
    assert 0 < summary["resumed_from_step"] < 40

    one, other = _adapter(tmp_path / "whole"), _adapter(broken)
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name
    assert read_metrics(tmp_path / "whole") == read_metrics(broken)


def _steps_written(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"train"') if file.exists() else 0


def test_a_finished_run_and_one_of_other_settings_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="other settings"):
        quickstart.run(quickstart.Config(run_folder=tmp_path))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match="finished run"):
        quickstart.run(quickstart.Config(run_folder=tmp_path))
