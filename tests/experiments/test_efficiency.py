"""The benchmark: steps of the same work, counts that add up, a report of what was measured."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import efficiency
from experiments.benchmarks import ahead_of_time, device_runs, peft_peer, scaling, targets
from experiments.benchmarks.cases import MLPShape, bert, llama, mlp
from experiments.benchmarks.report import write_report
from experiments.benchmarks.steps import METHODS, make_program
from experiments.benchmarks.timing import Times, time_in_turn
from experiments.models.bert import BertConfig
from experiments.models.llama_config import LlamaConfig

TINY_BERT = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
TINY_LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def tiny_mlp(**sizes):
    return mlp(tokens=16, rank=2, shape=MLPShape(width=16, depth=2), **sizes)


TINY_CASES = {
    "mlp": tiny_mlp,
    "bert": lambda: bert(texts=2, length=8, rank=2, shape=TINY_BERT),
    "llama": lambda: llama(shape=TINY_LLAMA, texts=2, length=8, rank=2),
}


def step_from(program, trainable):
    """The trained arrays after a step, and the loss."""
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.opt_state)
    after, _, loss = jax.jit(program.step)(trainable, program.frozen, opt_state, program.batch)
    return jax.tree.leaves(after), loss


def program_of(method, case, **options):
    program = make_program(METHODS[method], case.build(), case.adapter, case.loss, **options)
    return Batched(**vars(program), batch=case.batch)


@dataclasses.dataclass
class Batched:
    step: object
    trainable: object
    frozen: object
    opt_state: object
    batch: object


def moved(tree):
    """An adapter off its start, so that no gradient is zero."""
    key = jax.random.key(3)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), tree)


@pytest.mark.parametrize(
    ("case", "method", "by_hand"),
    [
        ("mlp", "lora", "lora-by-hand"),
        ("mlp", "dora", "dora-materialized"),
        ("bert", "dora", "dora-materialized"),
    ],
)
def test_a_step_of_the_library_is_the_step_written_by_hand(case, method, by_hand):
    case = TINY_CASES[case]()
    library, reference = program_of(method, case), program_of(by_hand, case)
    start = moved(library.trainable)
    same = jax.tree.unflatten(jax.tree.structure(reference.trainable), jax.tree.leaves(start))
    after, loss = step_from(library, start)
    expected, expected_loss = step_from(reference, same)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for array, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(array, other, atol=2e-6)


@pytest.mark.parametrize("method", ["dora", "dora-precomputed"])
def test_microbatches_take_the_step_of_the_whole_batch(method):
    case = tiny_mlp()
    whole = program_of(method.removesuffix("-precomputed"), case)
    parts = program_of(method, case, microbatches=4)
    start = moved(whole.trainable)
    expected, expected_loss = step_from(whole, start)
    after, loss = step_from(parts, start)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for array, other in zip(after, expected, strict=True):
        np.testing.assert_allclose(array, other, atol=1e-6)


def test_every_method_trains_only_what_it_says():
    case = tiny_mlp()
    width, depth, rank = case.shape.width, case.shape.depth, case.adapter.rank
    lora = depth * 2 * rank * width
    wanted = {
        "full": depth * (width + 1) * width,
        "lora": lora,
        "lora-by-hand": lora,
        "dora": lora + depth * width,
        "dora-materialized": lora + depth * width,
    }
    model = case.build()
    for name, count in wanted.items():
        program = make_program(METHODS[name], model, case.adapter, case.loss)
        assert program.trainable_parameters == count, name


def test_calls_are_timed_once_a_round_and_in_no_fixed_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = time_in_turn(calls, rounds=6, warm_up=1)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(rounds) == 7
    assert {r[0] for r in rounds[1:]} == {"a", "b", "c"}
    assert {len(t.seconds) for t in times.values()} == {6}


def test_a_ratio_is_taken_round_by_round():
    ratio = Times((2.0, 20.0, 6.0)).over(Times((1.0, 10.0, 2.0)))
    assert ratio.median == 2.0 and ratio.quartiles == (2.0, 2.5)


def test_frozen_scale_and_merged_inference_repeat_bit_for_bit_at_the_bases_cost():
    rows = device_runs.measure_inference(tiny_mlp(), rounds=2)
    assert all(row["repeats_bit_for_bit"] for row in rows.values())
    assert rows["merged"]["flops_over_base"] == 1.0
    assert rows["dora"]["flops"] > rows["dora-frozen-scale"]["flops"] > rows["base"]["flops"]


def test_the_compiled_step_of_dora_adds_the_products_of_the_norm_to_loras():
    tokens, width, rank = 64, 256, 4
    case = mlp(tokens=tokens, rank=rank, shape=MLPShape(width=width, depth=2))
    mesh = ahead_of_time.target_mesh("cpu")
    flops = {}
    for method in ("lora", "dora", "dora-detached", "dora-materialized"):
        program = make_program(METHODS[method], case.abstract(), case.adapter, case.loss)
        flops[method] = ahead_of_time.compile_for(program, case.batch, mesh, "fsdp")["flops"]
    product = 2 * rank * width * width * case.shape.depth
    elementwise = 20 * tokens * width * case.shape.depth
    assert 2 * product < flops["dora"] - flops["lora"] < 2 * product + elementwise
    assert product < flops["dora-detached"] - flops["lora"] < product + elementwise
    # The product A B, and the two of its gradient.
    assert flops["dora-materialized"] - flops["lora"] > 2 * product


def test_counts_over_microbatches_are_those_of_the_unrolled_program():
    mesh, case = ahead_of_time.target_mesh("cpu"), tiny_mlp()
    setting = ahead_of_time.Setting(microbatches=4)
    row = ahead_of_time.count_microbatches("dora-precomputed", case, mesh, setting)
    adapted = (METHODS["dora-precomputed"], case.abstract(), case.adapter, case.loss)
    program = make_program(*adapted, microbatches=4, unroll=True)
    batch = {name: np.concatenate([x] * 4) for name, x in case.batch.items()}
    unrolled = ahead_of_time.compile_for(program, batch, mesh, "fsdp")
    assert row["flops"] == pytest.approx(unrolled["flops"], rel=2e-3)


def test_the_policy_saves_the_last_projection_from_being_computed_again(monkeypatch):
    entries = {name: e for name, e in ahead_of_time.TABLES["remat"][1].items() if "mat" not in name}
    monkeypatch.setitem(ahead_of_time.TABLES, "remat", ("", entries))
    setting = ahead_of_time.Setting(shape=TINY_LLAMA, length=64, rank=2, dtype="float32")
    found = ahead_of_time.measure_table("remat", "cpu", setting)["remat"]
    flops = {name: row["flops"] for name, row in found["rows"].items()}
    tokens = found["setting"]["length"]
    product = 2 * tokens * TINY_LLAMA.intermediate_size * TINY_LLAMA.hidden_size
    assert product < flops["dora"] - flops["dora-policy"] < 1.5 * product
    assert found["rows"]["dora"]["over_lora"]["flops"] == flops["dora"] / flops["lora"]


def test_an_unknown_topology_is_named():
    with pytest.raises(SystemExit, match="v99:9x9"):
        ahead_of_time.target_mesh("v99:9x9")


def test_a_targets_figure_is_the_worst_one_or_none():
    target = targets.Target("", "", 1.0, ("train", "*", "rows", "dora"))
    results = {"train": {"a": {"rows": {"dora": 1.0}}, "b": {"rows": {"dora": 1.5, "lora": 2.0}}}}
    assert target.measured(results) == 1.5
    assert target.measured({"train": {"a": {"rows": {}}}}) is None


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("efficiency")


@pytest.fixture(scope="module")
def printed(results_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency, "CASES", {"mlp-512": tiny_mlp, "mlp-2048": tiny_mlp})
        curves = {"rank": ("rank", lambda r: mlp(tokens=16, rank=r, shape=MLPShape(16, 2)), (1,))}
        curves["compile"] = ("layers", None, (1,))
        patch.setattr(scaling, "CURVES", curves)
        common = ["--rounds", "2", "--results-folder", str(results_folder)]
        steps = ["--microbatches", "2", "--methods", "lora-by-hand", "lora"]
        efficiency.main(["--parts", "train", "--cases", "mlp-512", *steps, *common])
        config = efficiency.Config(
            parts=("inference", "scaling"),
            cases=("mlp-2048",),
            rounds=2,
            results_folder=results_folder,
        )
        return efficiency.run(config)


def test_the_report_has_what_two_commands_measured(printed, results_folder):
    results = json.loads((results_folder / "efficiency.json").read_text())
    assert set(results) == {"train", "inference", "scaling"}
    case = results["train"]["cpu"]["mlp-512"]
    assert set(case["rows"]) == {
        "lora-by-hand",
        "lora",
        "lora/2",
        "dora/2",
        "dora-precomputed/2",
    }
    assert case["stamp"]["versions"]["jax"] == jax.__version__
    for row in case["rows"].values():
        low, high = row["seconds_quartiles"]
        assert low <= row["seconds"] <= high and row["peak_bytes"] > 0
    assert set(results["inference"]["cpu"]) == {"mlp-2048"}
    assert (results_folder / "efficiency.md").read_text() == printed
    for part in ("steps", "scaling"):
        picture = (results_folder / f"efficiency_{part}_cpu.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_the_report_has_the_points_of_each_curve_beside_their_model(printed):
    lines = printed.splitlines()
    (rank,) = (lines[i + 2] for i, line in enumerate(lines) if line.startswith("| rank |"))
    # Measured, operations and the model 1 + r / N, for r = 1 and N = 16, exact and detached.
    cells = [cell.strip() for cell in rank.strip("|").split("|")]
    assert cells[0] == "1" and cells[3] == "1.062" and cells[6] == "1.031"
    assert 1.0 < float(cells[5]) < float(cells[2])
    assert any(line.startswith("| layers | lora, layers apart (s) |") for line in lines)


def test_the_report_holds_each_target_against_its_figure(printed, results_folder):
    results = json.loads((results_folder / "efficiency.json").read_text())
    rows = results["train"]["cpu"]["mlp-512"]["rows"]
    rows["dora"] = {**rows["lora"], "over_lora": {"median": 1.25, "quartiles": (1.2, 1.3)}}
    rows["lora"]["over_by_hand"]["median"] = 1.001
    text = write_report(results, results_folder / "again")
    assert "| CPU, MLP of 512 tokens: DoRA over LoRA | 1.06 | 1.25 | **missed** |" in text
    assert "| CPU: LoRA over LoRA written by hand | 1.02 | 1.001 | met |" in text
    assert "| TPU, no rematerialisation: FLOPs | 1.003 | not measured |  |" in text


def test_abstract_llama_7b_is_adapted_without_its_arrays():
    finished = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.abstract_model", "--scan"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    row = json.loads(finished.stdout)
    assert row["kernels"] == 7 and row["peak_gb"] < 2
    sizes = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert row["trainable_parameters"] == 32 * (32 * sizes + 5 * 4096 + 2 * 11008)


@pytest.mark.parametrize(
    ("field", "value"), [("cases", ("mlp-7",)), ("methods", ("adalora",)), ("tables", ("none",))]
)
def test_an_unknown_name_is_refused_with_the_known_ones(field, value):
    with pytest.raises(SystemExit, match=f"unknown {field}.*{value[0]}"):
        efficiency.Config(**{field: value})


def test_a_missing_peer_names_the_extra(monkeypatch):
    monkeypatch.setattr(peft_peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="parity"):
        efficiency.run(efficiency.Config(parts=("train",), peer="peft"))


@pytest.mark.parity
@pytest.mark.parametrize("case", TINY_CASES)
def test_the_peer_trains_as_many_numbers(case):
    pytest.importorskip("peft")
    case = TINY_CASES[case]()
    steps = peft_peer.training_steps(case)
    rows = device_runs.measure_training(case, ["lora", "dora"], rounds=2, peers=steps)
    for method in ("lora", "dora"):
        ours, theirs = rows[method], rows[f"peft-{method}"]
        assert ours["trainable_parameters"] == theirs["trainable_parameters"]
        assert set(ours["over_peer"]) == {f"peft-{method}"}
