"""Mistakes, and the errors that name them; `python -m tests.support.bad_inputs` prints a table."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.bad_inputs.adapter_trees import COMBINING, OPTIMISING, PRECOMPUTING
from tests.support.bad_inputs.models import BadInput
from tests.support.bad_inputs.models_in_use import ADAPTING, MERGING, RUNNING
from tests.support.bad_inputs.settings import CONFIGURATION, SELECTION

BAD_INPUTS = {
    "DoRAConfig": CONFIGURATION,
    "selection": SELECTION,
    "apply_dora": ADAPTING,
    "running": RUNNING,
    "merge": MERGING,
    "dora_optimizer": OPTIMISING,
    "adapter operations": COMBINING,
    "precompute and summary": PRECOMPUTING,
}


def raised(bad: BadInput) -> Exception | None:
    """Returns what a mistake raises."""
    try:
        bad.how()
    except Exception as error:
        return error
    return None


def markdown(table: dict[str, list[BadInput]]) -> Iterable[str]:
    """Yields the lines of a Markdown table: where, the mistake, what is raised."""
    yield "| where | mistake | error |"
    yield "|---|---|---|"
    for where, rows in table.items():
        for bad in rows:
            error = raised(bad)
            message = str(error).replace("|", r"\|").replace("\n", " ")
            yield f"| {where} | {bad.what} | `{type(error).__name__}`: {message} |"
