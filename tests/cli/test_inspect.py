"""`dora-jax inspect` and `dora-jax diff` show what NumPy computes from the arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import dora_jax as dora
from dora_jax.checkpoint import save
from tests.cli.folders import CONFIG, PEFT, PEFT_FOLDER, trained


def test_inspect_shows_layers_and_how_far_magnitudes_moved(folder, done):
    report, model = done("inspect", folder, "--json"), trained(CONFIG)
    assert [row["path"] for row in report["layers"]] == ["layer_0", "layer_1"]
    row = report["layers"][1]
    assert (row["rank"], row["alpha"], row["scaling"]) == (2, 16.0, 8.0)
    norm = np.linalg.norm(np.asarray(model.layer_1.kernel[...], np.float64), axis=0)
    drift = np.abs(np.asarray(model.layer_1.magnitude[...]) - norm) / norm
    np.testing.assert_allclose(row["magnitude_drift_mean"], drift.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["magnitude_drift_max"], drift.max(), rtol=1e-5)
    a, b = (np.asarray(x[...], np.float64) for x in (model.layer_1.lora_a, model.layer_1.lora_b))
    np.testing.assert_allclose(row["product_norm"], 8 * np.linalg.norm(a @ b), rtol=1e-6)
    assert report["parameters"] == dora.adapters.count_parameters(dora.get_adapters(model))
    assert report["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert dora.DoRAConfig(**report["config"]) == CONFIG
    text = done("inspect", folder)
    assert "layer_1" in text and "Orbax" in text and f"{drift.mean():.2%}" in text


@pytest.mark.parametrize("name", PEFT)
def test_inspect_and_diff_read_what_peft_wrote(name, done):
    folder = PEFT_FOLDER / name
    report = done("inspect", folder, "--json")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert report["format"] == "peft"
    assert report["parameters"]["total"] == sum(x.size for x in tensors.values())
    assert all(row["magnitude_drift_mean"] is None for row in report["layers"])
    assert done("diff", folder, folder, "--json")["equal"]


def test_diff_tells_what_changed(folder, tmp_path, run):
    assert run("diff", folder, folder)[0] == 0
    model = trained(CONFIG)
    model.layer_0.magnitude[...] *= 1.1
    # The same product: factors that are scaled against each other.
    model.layer_0.lora_a[...] *= 4
    model.layer_0.lora_b[...] /= 4
    b = np.asarray(model.layer_1.lora_b[...])
    model.layer_1.lora_b[...] = b * 2
    save(tmp_path / "other", model, CONFIG)
    status, out, _ = run("diff", folder, tmp_path / "other", "--json")
    report = json.loads(out)
    assert status == 1 and not report["equal"]
    first, second = report["layers"]
    assert first["direction"] < 1e-12 and not first["equal"]
    np.testing.assert_allclose([first["magnitude"], first["magnitude_max"]], 0.1 / 1.1, rtol=1e-5)
    np.testing.assert_allclose(second["direction"], 0.5, rtol=1e-6)
    assert second["magnitude"] == 0
    status, text, _ = run("diff", folder, tmp_path / "other")
    assert status == 1 and "9.09%" in text


def test_diff_tells_settings_and_layers_apart(folder, tmp_path, run):
    others = {
        "alpha": dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, alpha=8.0),
        "fewer": dora.DoRAConfig(rank=3, target_modules=["layer_0"]),
        "normalize": dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, normalize=False),
    }
    for name, config in others.items():
        save(tmp_path / name, trained(config), config)
        status, out, _ = run("diff", folder, tmp_path / name, "--json")
        assert status == 1 and not json.loads(out)["equal"], name
    assert json.loads(run("diff", folder, tmp_path / "fewer", "--json")[1])["only_in_first"] == [
        "layer_1"
    ]
    dropout = dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, dropout=0.5)
    save(tmp_path / "dropout", trained(dropout), dropout)
    assert run("diff", folder, tmp_path / "dropout")[0] == 0  # only acts in training
