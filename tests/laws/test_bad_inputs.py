"""No mistake passes in silence."""

from __future__ import annotations

import re

import pytest

import dora_jax as dora
from tests.support.bad_inputs import BAD_INPUTS, markdown, raised

EVERY = [(where, bad) for where, rows in BAD_INPUTS.items() for bad in rows]


@pytest.mark.parametrize("bad", [bad for _, bad in EVERY], ids=[f"{w}: {b.what}" for w, b in EVERY])
def test_a_mistake_has_its_error(bad):
    error = raised(bad)
    assert type(error) is bad.error, f"{error!r}"
    assert re.search(bad.message, str(error), re.DOTALL), str(error)


def test_errors_of_the_library_are_value_errors():
    errors = {bad.error for _, bad in EVERY} - {TypeError}
    assert errors == {dora.errors.ConfigError, dora.errors.LayoutError, dora.errors.AdapterError}
    assert all(
        issubclass(error, dora.DoRAError) and issubclass(error, ValueError) for error in errors
    )


def test_the_table_has_a_row_for_each_mistake():
    table = {"DoRAConfig": BAD_INPUTS["DoRAConfig"][:2]}
    assert list(markdown(table)) == [
        "| where | mistake | error |",
        "|---|---|---|",
        "| DoRAConfig | a negative rank | `ConfigError`: rank must be an integer of at least 0, "
        "got -1 |",
        "| DoRAConfig | half a rank | `ConfigError`: rank must be an integer of at least 0, "
        "got 2.5 |",
    ]
    assert len({(where, bad.what) for where, bad in EVERY}) == len(EVERY)
