"""A step of several microbatches is compared with LoRA's of as many."""

import pytest

from experiments.benchmarks import device_runs
from tests.experiments.tiny_models import tiny_mlp


@pytest.mark.full
def test_each_variant_is_compared_with_lora_on_as_many_microbatches():
    variants = ["lora-by-hand", "lora", "dora", "lora/2", "dora/2", "dora-hoisted/2"]
    rows = device_runs.measure_training(tiny_mlp(), variants, rounds=2)
    assert list(rows) == variants
    assert {name for name, row in rows.items() if row["over_lora"]["median"] == 1.0} >= {
        "lora",
        "lora/2",
    }
    assert {name for name, row in rows.items() if "over_by_hand" in row} == {"lora", "dora"}
    assert rows["dora/2"]["title"].endswith(", 2 microbatches")
