"""Two checkpoint folders compared: measured is what was changed, and nothing is left out."""

import csv
import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import decomposition
from experiments.reporting.checkpoint_folders import compare, compare_folders, same_names
from experiments.reporting.folders import ReportError

RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(6, 8)).astype(np.float32)  # (out, in)
TURNED = RNG.normal(size=(6, 8)).astype(np.float32)


def folder_of(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "any"}))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """After: a base in a head, with a column scaled, a kernel turned, a table of other size."""
    base = {
        "layer.0.query.weight": QUERY,
        "layer.1.query.weight": QUERY,
        "layer.0.mlp.c_fc.weight": QUERY,
        "layer.0.query.bias": np.ones(6, np.float32),
        "word_embeddings.weight": np.ones((5, 4), np.float32),
        "position_ids": np.arange(4),
        "pooler.weight": QUERY,
    }
    scaled, first_in = QUERY.copy(), QUERY.copy()
    scaled[2] *= 1.5
    first_in[:, 3] *= 1.5
    new = {
        "model.layer.0.query.weight": scaled,
        "model.layer.1.query.weight": TURNED.astype(ml_dtypes.bfloat16),
        "model.layer.0.mlp.c_fc.weight": first_in,
        "model.layer.0.query.bias": np.full(6, 1.1, np.float32),
        "model.word_embeddings.weight": np.ones((6, 4), np.float32),
        "model.position_ids": np.arange(4),
        "score.weight": QUERY,
    }
    folder = tmp_path_factory.mktemp("folders")
    return folder_of(folder / "before", base), folder_of(folder / "after", new)


def test_each_tensor_has_the_change_that_was_made(folders):
    changes = {change.name: change for change in compare(*folders).changes}
    scaled = changes["layer.0.query.weight"]
    norms = np.linalg.norm(QUERY.astype(np.float64), axis=1)
    assert scaled.magnitude == pytest.approx(0.5 * norms[2] / 6, rel=1e-5)
    assert scaled.relative_magnitude == pytest.approx(0.5 / 6, rel=1e-5)
    assert scaled.direction == pytest.approx(0, abs=1e-6)
    assert (scaled.effective_rank, scaled.stable_rank) == pytest.approx((1, 1), rel=1e-3)
    turned = TURNED.astype(ml_dtypes.bfloat16).astype(np.float64)
    cosine = np.sum(turned * QUERY, 1) / norms / np.linalg.norm(turned, axis=1)
    assert changes["layer.1.query.weight"].direction == pytest.approx(np.mean(1 - cosine), rel=1e-5)
    # Conv1D holds (in, out): its fourth out feature was scaled, one of eight.
    assert changes["layer.0.mlp.c_fc.weight"].relative_magnitude == pytest.approx(0.5 / 8, rel=1e-5)
    bias = changes["layer.0.query.bias"]
    assert bias.relative_norm == pytest.approx(0.1, rel=1e-5) and math.isnan(bias.direction)


def test_what_is_not_compared_is_named(folders):
    before, after = folders
    assert compare(before, after).problems == [
        f"only in {before}: pooler.weight",
        f"only in {after}: score.weight",
        "position_ids: I64 before, I64 after, not compared",
        "word_embeddings.weight: (5, 4) before, (6, 4) after",
    ]


def test_the_report_has_every_kind_and_the_csv_every_tensor(folders, tmp_path, capsys):
    options = ["--results-folder", str(tmp_path), "--compile-cache", "off"]
    decomposition.main(["--folders", *map(str, folders), *options])
    text = capsys.readouterr().out.rstrip("\n") + "\n"
    assert "| layer.*.query | 2 |" in text and "4 tensors compared, 0 of them are equal" in text
    assert "- only in" in text and (tmp_path / "fine_tune.md").read_text() == text
    rows = list(csv.DictReader((tmp_path / "fine_tune.csv").open()))
    assert [row["name"] for row in rows] == [c.name for c in compare(*folders).changes]
    assert (tmp_path / "fine_tune.png").read_bytes().startswith(b"\x89PNG")
    same = compare_folders(folders[0], folders[0], tmp_path)
    assert "too few changed kernels" in same and "6 of them are equal" in same


def test_names_are_mapped_either_way_and_other_models_are_refused(folders, tmp_path):
    assert same_names(["bert.a.w", "bert.b.w", "cls.w"], ["a.w", "b.w"]) == {
        "bert.a.w": "a.w",
        "bert.b.w": "b.w",
    }
    other = folder_of(tmp_path / "other", {"conv": np.ones(3, np.float32)})
    with pytest.raises(ReportError, match="no tensor in common"):
        compare(folders[0], other)
