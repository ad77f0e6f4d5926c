"""Calls are timed in turn, and compared round by round."""

from experiments.benchmarks.timing import Times, time_in_turn


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
