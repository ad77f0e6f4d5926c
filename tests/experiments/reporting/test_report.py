"""A report: it follows from the run folders, and what is missing there is named."""

import csv
import json

import numpy as np
import pytest

from experiments import report
from experiments.reporting.folders import ReportError, read_runs
from experiments.reporting.variants import reference_of, variants
from tests.experiments.reporting.run_folders import (
    BEST,
    RATES,
    predictions,
    score_of,
    write_run,
    write_sweep,
    write_test,
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def made(sweep, tmp_path_factory):
    """The folder of the report on the whole sweep."""
    output = tmp_path_factory.mktemp("report")
    report.main([str(sweep), "--output", str(output)])
    return output


def rows_of(file):
    return list(csv.DictReader(file.open(encoding="utf-8")))


def test_scores_and_intervals_are_those_of_the_test_splits(made):
    """In float64: means, Student's t of 3 seeds (4.3027) on the paired differences."""
    rows = {(row["task"], row["method"]): row for row in rows_of(made / "glue_results.csv")}
    assert len(rows) == 6
    for task in ("cola", "sst2"):
        of = {m: np.array([score_of(task, m, seed) for seed in range(3)]) for m in BEST}
        difference = 100 * (of["dora"] - of["lora"])
        half = 4.3027 * difference.std(ddof=1) / np.sqrt(3)
        row = rows[task, "DoRA, r 8"]
        assert float(row["score (× 100)"]) == pytest.approx(100 * of["dora"].mean())
        name = "minus LoRA, over seeds"
        found = [float(row[name + end]) for end in ("", ", low", ", high")]
        mean = difference.mean()
        np.testing.assert_allclose(found, [mean, mean - half, mean + half], atol=1e-4)
        examples = "minus LoRA, over examples"
        low, high = float(row[examples + ", low"]), float(row[examples + ", high"])
        assert low < mean < high
        assert float(row["time / LoRA"]) == pytest.approx(1.2)
        assert float(row["memory / LoRA"]) == pytest.approx(1.05)
        assert float(row["forgetting (nats)"]) == pytest.approx(0.02)
        assert row["trainable parameters"] == "110" and row["split"] == "test"


def test_the_rate_is_the_best_on_validation_and_its_edge_is_told(made):
    edges = {"full fine-tuning": "yes", "LoRA, r 8": "no", "DoRA, r 8": "yes"}
    for row in rows_of(made / "glue_results.csv"):
        assert row["at the grid's edge"] == edges[row["method"]]
    text = (made / "report.md").read_text()
    assert "cola DoRA, r 8: the rate 0.01 is at the edge of the grid" in text
    assert "## Missing" not in text


def test_every_run_is_listed_with_folder_and_command(made, sweep):
    rows = rows_of(made / "runs.csv")
    assert {row["folder"] for row in rows} == {str(p.parent) for p in sweep.rglob("summary.json")}
    assert all(row["command"] for row in rows)
    content = json.loads((made / "report.json").read_text())
    assert len(content["runs"]) == len(rows) and content["missing"] == []
    for name in ("glue_scores.png", "glue_rates.png"):
        assert (made / name).read_bytes().startswith(b"\x89PNG")
    assert r"\toprule" in (made / "glue_results.tex").read_text()


def test_the_average_is_over_tasks_and_paired_over_seeds(made):
    rows = {row["method"]: row for row in rows_of(made / "glue_overview.csv")}
    averages = {
        m: np.array([np.mean([score_of(t, m, s) for t in ("cola", "sst2")]) for s in range(3)])
        for m in BEST
    }
    row = rows["DoRA, r 8"]
    assert float(row["average"]) == pytest.approx(100 * averages["dora"].mean())
    difference = 100 * np.mean(averages["dora"] - averages["lora"])
    assert float(row["average minus LoRA"]) == pytest.approx(difference)


def test_a_folder_deleted_in_part_is_named_and_nothing_is_invented(tmp_path, capsys):
    root = write_sweep(tmp_path / "runs", tasks=["sst2"])
    folder = {m: root / "glue" / "sst2" / f"{m}_r8_lr-{BEST[m]:g}_seed-1" for m in ("lora", "dora")}
    (folder["dora"] / "test.json").unlink()
    (folder["lora"] / "summary.json").unlink()
    damaged = root / "glue" / "sst2" / "lora_r8_lr-0.0001_seed-0"
    (damaged / "summary.json").write_text('{"validation": ')
    bare = root / "glue" / "sst2" / "lora_r8_lr-0.01_seed-0"
    (bare / "config.json").unlink()
    adapter = root / "glue" / "sst2" / "lora_r8_lr-0.001_seed-0" / "best"
    adapter.mkdir()
    (adapter / "config.json").write_text("{}")  # of an adapter: a part of the run, no run itself
    for file in root.rglob("full_*/test_predictions.npz"):
        file.unlink()
    report.main([str(root), "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    for line in (
        f"{folder['dora']} has no test.json: not in the table",
        f"{folder['lora']} has no summary.json, it did not finish: not in the table",
        f"{damaged / 'summary.json'} is damaged",
        f"{bare} has no config.json",
        "sst2 DoRA, r 8: no seed 1",
        "sst2 LoRA, r 8: no run at the rate 0.0001, 0.01",
    ):
        assert line in text
    assert str(adapter) not in text
    rows = {row["method"]: row for row in rows_of(tmp_path / "out" / "glue_results.csv")}
    dora = 100 * np.mean([score_of("sst2", "dora", seed) for seed in (0, 2)])
    assert float(rows["DoRA, r 8"]["score (× 100)"]) == pytest.approx(dora)
    assert rows["DoRA, r 8"]["seeds"] == "2"
    assert rows["LoRA, r 8"]["at the grid's edge"] == "one rate"
    assert rows["full fine-tuning"]["minus LoRA, over examples"] == ""


def test_without_test_scores_the_validation_split_is_named(tmp_path):
    for rate in RATES:
        write_run(tmp_path, "sst2", "dora", rate, seed=0)
    (variant,) = variants(read_runs([tmp_path]).runs)
    assert not variant.is_tested and variant.rate == BEST["dora"]
    assert not variant.score().known


def test_test_scores_at_another_rate_than_the_best_are_told(tmp_path, capsys):
    for rate in RATES:
        folder = write_run(tmp_path, "sst2", "dora", rate, seed=0)
        if rate == 1e-3:
            write_test(folder, 0.9, *predictions("dora", 0))
    report.main([str(tmp_path), "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "test scores are at the rate 0.001, but the validation split prefers 0.01" in text


def test_the_base_as_it_is_and_further_metrics_have_a_place(tmp_path, capsys):
    """The base has no rate; runs tested on several files have a metric for each."""
    for method, rate in (("base", 0.0), ("lora", 1e-3)):
        folder = write_run(tmp_path, "sst2", method, rate, seed=0)
        (folder / "test.json").write_text(
            json.dumps({"accuracy": 0.5, "piqa/accuracy": 0.625, "loss": 1.0, "examples": 8})
        )
        report.main([str(tmp_path), "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "| task | method | piqa/accuracy |" in text
    assert "| sst2 | not fine-tuned | 62.50 |" in text
    assert "| sst2 | LoRA, r 8 | 62.50 |" in text


def test_settings_that_differ_are_variants_of_their_own(tmp_path):
    """And are compared with the reference that differs least from them."""
    write_run(tmp_path, "sst2", "full", 1e-3, seed=0, batch_size=8)
    for size in (8, 16):
        for method in ("lora", "dora"):
            write_run(tmp_path, "sst2", method, 1e-3, seed=0, batch_size=size)
    found = {(v.method, v.setting): v for v in variants(read_runs([tmp_path]).runs)}
    assert list(found) == [
        ("full", ""),
        ("lora", ""),
        ("lora", "batch_size 16"),
        ("dora", ""),
        ("dora", "batch_size 16"),
    ]
    every = list(found.values())
    for key, own in found.items():
        expected = None if key[0] == "lora" else found["lora", key[1]]
        assert reference_of(own, every, "lora") == expected


def test_a_dry_run_lists_and_writes_nothing(sweep, capsys):
    before = sorted(sweep.rglob("*"))
    report.main([str(sweep), "--dry-run"])
    assert sorted(sweep.rglob("*")) == before
    assert "glue sst2: DoRA, r 8: 5 runs, 3 learning rates, 3 seeds" in capsys.readouterr().out


def test_a_folder_without_runs_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="is no folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(ReportError, match="no finished run"):
        read_runs([tmp_path])
