"""The rate is chosen on the validation examples; the test split is for the chosen runs alone."""

import dataclasses

import numpy as np
import pytest

from experiments.sweeps.choice import tune
from experiments.sweeps.grid import members, parse_axis
from experiments.sweeps.members import Member
from experiments.trainer.settings import SettingsError


@dataclasses.dataclass
class Recorded:
    """A sweep whose results are a function of the member; it records what it is asked."""

    metric: str = "f1"
    trained: list = dataclasses.field(default_factory=list)
    tested: list = dataclasses.field(default_factory=list)
    forgotten: list = dataclasses.field(default_factory=list)

    @property
    def task(self):
        return self

    def families(self, members):
        return [[member] for member in members]

    def run(self, members):
        self.trained += [m for m in members if m not in self.trained]
        return {m: {"validation": self.validation(m)} for m in members}

    def validation(self, member):
        if member.learning_rate > 1 and member.seed == 1:
            return {"f1": None, "loss": None}
        distance = abs(np.log10(member.learning_rate / (1e-1 / member.rank)))
        return {"f1": 1 - distance - 0.01 * member.seed, "loss": 1.0}

    def test(self, members):
        self.tested += members
        return {m: {"f1": 0.5} for m in members}

    def forget(self, members):
        self.forgotten += members


@pytest.fixture(scope="module")
def tuned():
    sweep = Recorded()
    settings = [Member(rank=rank) for rank in (1, 10)]
    return sweep, settings, tune(sweep, settings, (1e-3, 1e-2, 1e-1, 1e1), choosing=2, seeds=3)


def test_every_rate_has_the_choosing_seeds_and_the_best_one_all(tuned):
    sweep, settings, found = tuned
    assert [found[own].learning_rate for own in settings] == [1e-1, 1e-2]
    assert len(sweep.trained) == 2 * (4 * 2 + 1)
    for own in found.values():
        assert [member.seed for member in own.members] == [0, 1, 2] and not own.at_edge


def test_a_rate_with_a_run_that_diverged_is_not_chosen(tuned):
    assert all(own.validation[1e1] is None for own in tuned[2].values())


def test_the_test_split_is_for_the_chosen_runs_and_the_others_are_forgotten(tuned):
    sweep, _, found = tuned
    assert sweep.tested == [member for own in found.values() for member in own.members]
    assert set(sweep.forgotten) == set(sweep.trained) - set(sweep.tested)


def test_a_rate_at_the_edge_of_the_grid_is_named():
    (found,) = tune(Recorded(), [Member(rank=1)], (1e-3, 1e-2), choosing=1, seeds=1).values()
    assert found.at_edge


def test_a_range_has_equal_ratios():
    name, rates = parse_axis("learning_rate=1e-5..1e-2:13")
    assert name == "learning_rate" and len(rates) == 13 and (rates[0], rates[-1]) == (1e-5, 1e-2)
    np.testing.assert_allclose(np.diff(np.log(rates)), np.log(10) / 4, atol=1e-2)


def test_members_are_all_combinations_and_keep_their_scaling():
    axes = dict(parse_axis(text) for text in ("rank=1,2,4", "init=orthogonal", "method=lora,dora"))
    found = members(Member(rank=8, alpha=16), axes, range(2))
    assert len(found) == len(set(found)) == 12
    assert {m.alpha / m.rank for m in found} == {2.0}
    assert {m.switches for m in found} == {(("init", "orthogonal"),)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rate=1,2", "no field 'rate'"),
        ("rank", "FIELD=VALUES"),
        ("learning_rate=1e-2..1e-5:3", "LOW..HIGH:COUNT"),
        ("learning_rate=1e-5..1e-2", "LOW..HIGH:COUNT"),
    ],
)
def test_a_sweep_that_means_nothing_is_refused(text, says):
    with pytest.raises(SettingsError, match=says):
        parse_axis(text)
