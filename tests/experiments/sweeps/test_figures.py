"""The figures of a sweep are ratios of the same work, together and alone."""

import dataclasses

import pytest

from experiments.benchmarks.cases import bert
from experiments.sweeps import figures
from tests.experiments.tiny_models import BERT, LLAMA

# A key of the tests' kind draws other numbers under vmap than alone.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = figures.Config(members=3, batch_size=2, length=4, rank=2, rounds=2)


@pytest.mark.full
def test_members_together_have_the_losses_of_each_alone_and_no_more_memory():
    shape = dataclasses.replace(BERT, **NO_DROPOUT)
    found = figures.measure(CONFIG, bert(texts=2, length=4, rank=2, shape=shape))
    assert found["largest_loss_difference"] <= 1e-6 and found["steps"] == 4
    assert found["memory_ratio"] <= 1.1
    low, high = found["time_ratio_quartiles"]
    assert low <= found["time_ratio"] <= high


@pytest.mark.full
def test_the_frozen_block_is_read_once_for_all_members():
    config = dataclasses.replace(CONFIG, target="cpu", members=8)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    block = figures.BlocksShape(**(dataclasses.asdict(LLAMA) | sizes))
    found = figures.count_bytes(config, tokens=4, shape=block)
    assert found["ratio"] < 0.5 and found["ratio"] == found["together"] / found["alone"]
