"""A bound finds its figure in the results."""

from experiments.benchmarks import targets


def test_a_targets_figure_is_the_worst_one_or_none():
    target = targets.Target("", "", 1.0, ("train", "*", "rows", "dora"))
    results = {"train": {"a": {"rows": {"dora": 1.0}}, "b": {"rows": {"dora": 1.5, "lora": 2.0}}}}
    assert target.measured(results) == 1.5
    assert target.measured({"train": {"a": {"rows": {}}}}) is None
