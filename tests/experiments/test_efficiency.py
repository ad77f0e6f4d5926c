"""The command line of the benchmark, and its report."""

import json

import jax
import pytest

from experiments import efficiency
from experiments.benchmarks import scaling
from experiments.benchmarks.cases import MLPShape, mlp
from experiments.benchmarks.report import write_report
from tests.experiments.tiny_models import tiny_mlp


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("efficiency")


@pytest.fixture(scope="module")
def printed(results_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency, "CASES", {"mlp-512": tiny_mlp, "mlp-2048": tiny_mlp})
        case = mlp(tokens=16, rank=1, shape=MLPShape(16, 1))
        patch.setattr(scaling, "CURVES", {"rank": ("rank", lambda r: case, (1,))})
        common = ["--rounds", "2", "--results-folder", str(results_folder)]
        steps = ["--microbatches", "0", "--methods", "lora", "dora"]
        efficiency.main(["--parts", "train", "--cases", "mlp-512", *steps, *common])
        config = efficiency.Config(
            parts=("inference", "scaling"),
            cases=("mlp-2048",),
            rounds=2,
            results_folder=results_folder,
        )
        return efficiency.run(config)


@pytest.mark.full
def test_the_report_has_what_two_commands_measured(printed, results_folder):
    results = json.loads((results_folder / "efficiency.json").read_text())
    assert set(results) == {"train", "inference", "scaling"}
    case = results["train"]["cpu"]["mlp-512"]
    assert set(case["rows"]) == {"lora", "dora"}
    assert case["stamp"]["versions"]["jax"] == jax.__version__
    for row in case["rows"].values():
        low, high = row["seconds_quartiles"]
        assert low <= row["seconds"] <= high and row["peak_bytes"] > 0
    assert set(results["inference"]["cpu"]) == {"mlp-2048"}
    assert (results_folder / "efficiency.md").read_text() == printed
    for part in ("steps", "scaling"):
        picture = (results_folder / f"efficiency_{part}_cpu.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


@pytest.mark.full
def test_frozen_scale_and_merged_inference_repeat_bit_for_bit_at_the_bases_cost(
    printed, results_folder
):
    results = json.loads((results_folder / "efficiency.json").read_text())
    rows = results["inference"]["cpu"]["mlp-2048"]["rows"]
    assert all(row["repeats_bit_for_bit"] for row in rows.values())
    assert rows["merged"]["flops_over_base"] == 1.0
    assert rows["dora"]["flops"] > rows["dora-frozen-scale"]["flops"] > rows["base"]["flops"]


@pytest.mark.full
def test_the_report_has_the_points_of_each_curve_beside_their_model(printed):
    lines = printed.splitlines()
    (rank,) = (lines[i + 2] for i, line in enumerate(lines) if line.startswith("| rank |"))
    # Measured, operations and the model 1 + r / N, for r = 1 and N = 16, exact and detached.
    cells = [cell.strip() for cell in rank.strip("|").split("|")]
    assert cells[0] == "1" and cells[3] == "1.062" and cells[6] == "1.031"
    assert 1.0 < float(cells[5]) < float(cells[2])


@pytest.mark.full
def test_the_curve_of_compile_times_has_a_column_for_each_way(tmp_path):
    curves = scaling.measure("compile", rounds=1, points=(1,))
    curves["compile"]["stamp"] = efficiency.stamp()
    lines = write_report({"scaling": {"cpu": curves}}, tmp_path).splitlines()
    assert any(line.startswith("| layers | lora, layers apart (s) |") for line in lines)


@pytest.mark.full
def test_the_report_holds_each_target_against_its_figure(printed, results_folder):
    results = json.loads((results_folder / "efficiency.json").read_text())
    rows = results["train"]["cpu"]["mlp-512"]["rows"]
    rows["dora"] = {**rows["lora"], "over_lora": {"median": 1.25, "quartiles": (1.2, 1.3)}}
    rows["lora"]["over_by_hand"] = {"median": 1.001, "quartiles": (1.0, 1.002)}
    text = write_report(results, results_folder / "again")
    assert "| CPU, MLP of 512 tokens: DoRA over LoRA | 1.06 | 1.25 | **missed** |" in text
    assert "| CPU: LoRA over LoRA written by hand | 1.02 | 1.001 | met |" in text
    assert "| TPU, no rematerialisation: FLOPs | 1.003 | not measured |  |" in text


@pytest.mark.parametrize(
    ("field", "value"), [("cases", ("mlp-7",)), ("methods", ("adalora",)), ("tables", ("none",))]
)
def test_an_unknown_name_is_refused_with_the_known_ones(field, value):
    with pytest.raises(SystemExit, match=f"unknown {field}.*{value[0]}"):
        efficiency.Config(**{field: value})
