"""Counts of compiled programs are those of their products, and add up over microbatches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import dora_jax as dora
from dora_jax.ops import cheap_ways_alone
from experiments.benchmarks import ahead_of_time
from experiments.benchmarks.cases import MLPShape, llama, mlp
from experiments.benchmarks.steps import METHODS, make_program
from tests.experiments.tiny_models import LLAMA, tiny_mlp

TINY_LLAMA = dataclasses.replace(LLAMA, num_hidden_layers=1)
WIDE = mlp(tokens=64, rank=4, shape=MLPShape(width=256, depth=1))
PRODUCT = 2 * WIDE.adapter.rank * WIDE.shape.width**2
ELEMENTWISE = 20 * WIDE.tokens * WIDE.shape.width


@functools.cache
def flops(method):
    """Operations of a step of one wide layer."""
    program = make_program(METHODS[method], WIDE.abstract(), WIDE.adapter, WIDE.loss)
    mesh = ahead_of_time.target_mesh("cpu")
    return ahead_of_time.compile_for(program, WIDE.batch, mesh, "fsdp")["flops"]


@pytest.mark.parametrize(
    ("method", "products", "most"),
    [
        ("dora", 2, 2 * PRODUCT + ELEMENTWISE),
        pytest.param("dora-detached", 1, PRODUCT + ELEMENTWISE, marks=pytest.mark.full),
        # The product A B, and the two of its gradient.
        pytest.param("dora-materialized", 2, np.inf, marks=pytest.mark.full),
    ],
    ids=["exact", "detached", "materialized"],
)
def test_the_compiled_step_of_dora_adds_the_products_of_the_norm_to_loras(method, products, most):
    assert products * PRODUCT < flops(method) - flops("lora") < most


@pytest.mark.full
def test_counts_over_microbatches_are_those_of_the_unrolled_program():
    mesh, case = ahead_of_time.target_mesh("cpu"), tiny_mlp()
    setting = ahead_of_time.Setting(microbatches=3)
    row = ahead_of_time.count_microbatches("dora-hoisted", case, mesh, setting)
    adapted = (METHODS["dora-hoisted"], case.abstract(), case.adapter, case.loss)
    program = make_program(*adapted, microbatches=3, unroll=True)
    batch = {name: np.concatenate([x] * 3) for name, x in case.batch.items()}
    unrolled = ahead_of_time.compile_for(program, batch, mesh, "fsdp")
    assert row["flops"] == pytest.approx(unrolled["flops"], rel=2e-3)


def assert_one_product_is_saved(flops, tokens):
    product = 2 * tokens * TINY_LLAMA.intermediate_size * TINY_LLAMA.hidden_size
    assert product < flops["dora"] - flops["dora-policy"] < 1.5 * product


@pytest.mark.full
def test_the_policy_saves_the_last_projection_from_being_computed_again():
    policies = {"dora": True, "dora-policy": dora.save_scaled(ahead_of_time.LAST_PROJECTION)}
    flops = {}
    for name, remat in policies.items():
        case = llama(shape=TINY_LLAMA, length=64, rank=2, remat=remat)
        program = make_program(METHODS["dora"], case.abstract(), case.adapter, case.loss)
        with cheap_ways_alone():
            lowered = jax.jit(program.step).lower(
                program.trainable, program.frozen, program.opt_state, case.batch
            )
        flops[name] = lowered.cost_analysis()["flops"]
    assert_one_product_is_saved(flops, case.tokens)


@pytest.mark.full
def test_the_compiled_table_of_policies_has_the_ratios_to_lora(monkeypatch):
    entries = {name: e for name, e in ahead_of_time.TABLES["remat"][1].items() if "mat" not in name}
    monkeypatch.setitem(ahead_of_time.TABLES, "remat", ("", entries))
    setting = ahead_of_time.Setting(shape=TINY_LLAMA, length=64, rank=2, dtype="float32")
    found = ahead_of_time.measure_table("remat", "cpu", setting)["remat"]
    flops = {name: row["flops"] for name, row in found["rows"].items()}
    assert_one_product_is_saved(flops, found["setting"]["length"])
    assert found["rows"]["dora"]["over_lora"]["flops"] == flops["dora"] / flops["lora"]


def test_an_unknown_topology_is_named():
    with pytest.raises(SystemExit, match="v99:9x9"):
        ahead_of_time.target_mesh("v99:9x9")
