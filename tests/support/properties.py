"""Laws over drawn values: few examples by default, many in the full set."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest


def for_all(
    *strategies: Any, few: int = 8, many: int = 100, **named: Any
) -> Callable[..., Callable[..., None]]:
    """Makes tests of a law: one that draws `few` examples, and one marked `full` with `many`."""

    def decorate(law: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.full)])
        def test(examples: int) -> None:
            hypothesis.settings(max_examples=examples)(
                hypothesis.given(*strategies, **named)(law)
            )()

        test.__name__, test.__qualname__ = law.__name__, law.__qualname__
        test.__doc__, test.__module__ = law.__doc__, law.__module__
        assert not set(inspect.signature(law).parameters) & {"examples"}
        return test

    return decorate
