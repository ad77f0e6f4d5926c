"""The grammar of `--sweep`, and the members that it names."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import dora_jax as dora
from experiments.sweeps.members import Member
from experiments.trainer.settings import SettingsError

_OWN = {field.name for field in dataclasses.fields(Member)} - {"switches", "seed"}
_SWITCHES = {field.name for field in dataclasses.fields(dora.DoRAConfig)} - _OWN

Axes = Mapping[str, Sequence[Any]]
"""Values to try, by the field of `Member` or of `DoRAConfig`."""


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Reads one `--sweep`: a field, and its values or a range of them.

    `1e-5..1e-2:4` are 4 numbers from the first to the last, each the same multiple of the one
    before. `1,2,4` are values, and `q_proj+v_proj` is one value that is a list.

    Raises:
        SettingsError: No such field, or a range that is none.

    Example:
        >>> parse_axis("learning_rate=1e-5..1e-2:4")
        ('learning_rate', (1e-05, 0.0001, 0.001, 0.01))
        >>> parse_axis("rank=1,4"), parse_axis("target_modules=q_proj+v_proj")
        (('rank', (1, 4)), ('target_modules', (('q_proj', 'v_proj'),)))
    """
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise SettingsError(f"--sweep {text}: give FIELD=VALUES, as learning_rate=1e-5..1e-2:12")
    if name not in _OWN | _SWITCHES:
        raise SettingsError(
            f"--sweep {text}: no field {name!r}; there are {', '.join(sorted(_OWN))}, and those of "
            "DoRAConfig"
        )
    if ".." in values:
        return name, _range(text, values)
    return name, tuple(map(_value, values.split(",")))


def members(usual: Member, axes: Axes, seeds: Sequence[int]) -> list[Member]:
    """Returns a member for each combination of values and each seed.

    Where the rank is varied and alpha is not, `alpha / rank` stays as it is.

    Args:
        usual: Has the values of all other fields.
        axes: Values to try.
        seeds: Seeds of each combination.

    Example:
        >>> found = members(Member(rank=8, alpha=16), {"rank": (4, 8), "eps": (1e-6,)}, (0, 1))
        >>> [(m.rank, m.alpha, m.seed, m.switches) for m in found[1:3]]
        [(4, 8.0, 1, (('eps', 1e-06),)), (8, 16.0, 0, (('eps', 1e-06),))]
    """
    found = []
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        own = {name: given.pop(name) for name in tuple(given) if name in _OWN}
        if "rank" in own and "alpha" not in own and usual.rank:
            own["alpha"] = usual.alpha * own["rank"] / usual.rank
        switches = tuple((dict(usual.switches) | given).items())
        found += [dataclasses.replace(usual, **own, switches=switches, seed=s) for s in seeds]
    return list(dict.fromkeys(found))


def _range(text: str, values: str) -> tuple[float, ...]:
    bounds, _, count = values.partition(":")
    try:
        low, high = map(float, bounds.split(".."))
        number = int(count)
    except ValueError:
        number = 0
    if number < 2 or not 0 < low < high < math.inf:
        raise SettingsError(f"--sweep {text}: a range is LOW..HIGH:COUNT, with 0 < LOW < HIGH")
    ratio = (high / low) ** (1 / (number - 1))
    return tuple(float(f"{low * ratio**i:.3g}") for i in range(number))


def _value(text: str) -> Any:
    if "+" in text.lstrip("+-") and not _is_number(text):
        return tuple(text.split("+"))
    if text in ("True", "False"):
        return text == "True"
    if not _is_number(text):
        return text
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
