"""The report of any sweep: tables of scores and costs, what is missing, and where it came from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.reporting import published
from experiments.reporting.figures import plot_rates, plot_scores
from experiments.reporting.folders import Runs
from experiments.reporting.overview import overview
from experiments.reporting.statistics import mean_interval
from experiments.reporting.tables import Cell, Column, Table
from experiments.reporting.variants import (
    Variant,
    over_examples,
    over_seeds,
    reference_of,
    variants,
)
from experiments.trainer.methods import METHODS

_HUNDRED = 100.0
_ROW = ("task", "method", "setting")
_COSTS = "trainable parameters"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report is made from.

    Attributes:
        runs: The run folders.
        reference: The method that others are compared with.
        command: How the report is made.
    """

    runs: Runs
    reference: str
    command: str


def results_table(found: Sequence[Variant], reference: str) -> Table:
    """Returns a row for each task, method, rank and setting."""
    title = METHODS[reference].title
    columns = (
        *(Column("task"), Column("method"), Column("setting"), Column("metric"), Column("split")),
        *(Column("score (× 100)", 2), Column("seeds")),
        Column(f"minus {title}, over seeds", 2, signed=True),
        Column(f"minus {title}, over examples", 2, signed=True),
        *(Column(_COSTS), Column(f"time / {title}", 2), Column(f"memory / {title}", 2)),
        Column("forgetting (nats)", 4, signed=True),
        *(Column("learning rate"), Column("at the grid's edge")),
    )
    return Table(columns, tuple(_row(v, found, reference) for v in found)).without_empty_columns()


def _row(variant: Variant, found: Sequence[Variant], reference: str) -> tuple[Cell, ...]:
    other = reference_of(variant, found, reference)
    examples = over_examples(variant, other) if other else None
    parameters = variant.mean_of("trainable_parameters").value
    return (
        variant.task,
        variant.title,
        variant.setting,
        variant.metric,
        "test" if variant.is_tested else "validation",
        variant.score().scaled(_HUNDRED),
        len(variant.final),
        over_seeds(variant, other).scaled(_HUNDRED) if other else None,
        examples.scaled(_HUNDRED) if examples else None,
        None if math.isnan(parameters) else int(parameters),
        *(
            _ratio(variant, other, field) if other or variant.method == reference else None
            for field in ("seconds_per_step", "temporary_bytes")
        ),
        variant.mean_of("forgetting"),
        f"{variant.rate:g}",
        {None: "one rate", True: "yes", False: "no"}[variant.at_edge],
    )


def halves(table: Table) -> tuple[Table, Table]:
    """Returns the table of results as two that fit on a page: scores, and what they cost."""
    names = [column.name for column in table.columns]
    cut = names.index(_COSTS)
    scores = (
        "Means over seeds at the chosen rate, with 95 % intervals: Student's t over seeds. "
        "Differences are paired: over the seeds that both have, and over the test examples, drawn "
        "anew (bootstrap). What is subtracted differs least in settings, then has the same rank. "
        "Scores of the validation split are a little too high, because that split chose the rate."
    )
    costs = (
        "Time and memory are ratios: seconds of a step, and temporary arrays of the compiled step. "
        "Forgetting is the change of the base's loss on text it was not tuned on."
    )
    return (
        table.only(*names[:cut], caption=scores),
        table.only(*_ROW, *names[cut:], caption=costs),
    )


def metrics_table(found: Sequence[Variant]) -> Table | None:
    """Returns the means of all test metrics beside the one that selects; None if there are none.

    Losses are left out: they are no shares.
    """
    runs = [run for variant in found for run in variant.final.values()]
    known = {"examples", *(run.metric for run in runs)}
    names = list(dict.fromkeys(name for run in runs for name in run.test or {}))
    names = [n for n in names if n not in known and n.rpartition("/")[2] != "loss"]
    if not names:
        return None
    rows = []
    for variant in found:
        means = [mean_interval(list(variant.scores(name).values())).value for name in names]
        scaled = (_HUNDRED * mean if variant.is_tested else None for mean in means)
        rows.append((variant.task, variant.title, variant.setting, *scaled))
    columns = (*map(Column, _ROW), *(Column(name, 2) for name in names))
    return Table(columns, tuple(rows), "All test metrics (× 100): means over seeds.")


def _ratio(variant: Variant, other: Variant | None, field: str) -> float | None:
    """Returns a cost over that of the reference, which is compared with itself."""
    other = other or variant
    own, of_other = variant.mean_of(field).value, other.mean_of(field).value
    return own / of_other if of_other else None


def notes(found: Sequence[Variant]) -> list[str]:
    """Returns what a reader should know before trusting a row: edges, other choices, gaps."""
    lines = []
    found = [variant for variant in found if variant.is_trained]
    for variant in found:
        name = _name(variant)
        if variant.at_edge:
            lines.append(f"{name}: the rate {variant.rate:g} is at the edge of the grid")
        if variant.rate != variant.best_rate:
            lines.append(
                f"{name}: test scores are at the rate {variant.rate:g}, but the validation split "
                f"prefers {variant.best_rate:g}"
            )
        if not variant.is_tested:
            lines.append(f"{name}: no run has a test.json, so that the score is of validation")
        else:
            lines += [
                f"{run.folder} has no test.json: not in the table"
                for run in variant.runs
                if run.config["learning_rate"] == variant.rate and run.test is None
            ]
    for task in dict.fromkeys(v.task for v in found):
        of_task = [variant for variant in found if variant.task == task]
        every = sorted({seed for variant in of_task for seed in variant.final})
        rates = sorted({rate for variant in of_task for rate in variant.curve})
        for variant in of_task:
            seeds = [str(seed) for seed in every if seed not in variant.final]
            lacking = [f"{rate:g}" for rate in rates if rate not in variant.curve]
            if seeds:
                lines.append(f"{_name(variant)}: no seed {', '.join(seeds)}")
            if lacking:
                lines.append(f"{_name(variant)}: no run at the rate {', '.join(lacking)}")
    return lines


def _name(variant: Variant) -> str:
    return " ".join(x for x in (variant.task, variant.title, variant.setting) if x)


def write_report(report: Report, folder: Path) -> str:
    """Writes report.md, report.json, the tables and the figures; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    every, runs = variants(report.runs.runs), report.runs.runs
    lines = ["# Results", "", f"Made by `{report.command}` from {len(runs)} runs.", ""]
    records: dict[str, object] = {}
    for experiment in dict.fromkeys(variant.experiment for variant in every):
        found = [variant for variant in every if variant.experiment == experiment]
        table = results_table(found, report.reference)
        records[experiment] = table.records()
        table.write(folder, f"{experiment}_results")
        lines += _section(found, table, report.reference, folder)
    if report.runs.problems:
        lines += ["## Missing", "", *(f"- {line}" for line in report.runs.problems), ""]
    source = sources(report.runs)
    source.write(folder, "runs")
    commands = dict.fromkeys(command for run in runs for command in run.commands)
    lines += ["## Commands", "", "Every run, with its folder and revision, is in runs.csv.", ""]
    lines += [*(f"- `{command}`" for command in commands), ""]
    text = "\n".join(lines)
    (folder / "report.md").write_text(text, encoding="utf-8")
    content = {"results": records, "missing": report.runs.problems, "runs": source.records()}
    (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return text


def _section(found: Sequence[Variant], table: Table, reference: str, folder: Path) -> list[str]:
    """Writes the overview and the figures of one experiment; returns the lines of its Markdown."""
    experiment = found[0].experiment
    models = ", ".join(dict.fromkeys(variant.model for variant in found))
    lines = [f"## {experiment}: {models}", ""]
    summary = overview(found, reference)
    if summary is not None:
        summary.write(folder, f"{experiment}_overview")
        lines += [summary.markdown(), ""]
    if any(variant.is_trained for variant in found):
        plot_scores(found, folder / f"{experiment}_scores.png")
        lines += [f"![scores]({experiment}_scores.png)", ""]
    more = metrics_table(found)
    for part in (*halves(table), *([] if more is None else [more.without_empty_columns()])):
        lines += [part.markdown(), ""]
    if any(len(variant.curve) > 1 for variant in found):
        plot_rates(found, folder / f"{experiment}_rates.png")
        lines += [f"![score by learning rate]({experiment}_rates.png)", ""]
    if (beside := published.table(experiment)) is not None:
        lines += ["### Published", "", beside.markdown(), ""]
    if remarks := notes(found):
        lines += ["### To be kept in mind", "", *(f"- {line}" for line in remarks), ""]
    return lines


def sources(runs: Runs) -> Table:
    """Returns a row for each run: its figures, folder, command and revision."""
    names = ("experiment", "task", "method", "rank", "learning_rate", "seed")
    rows = tuple(
        (
            *(run.config[name] for name in names),
            run.metric,
            run.validation(),
            run.test_score(),
            str(run.folder),
            "; ".join(run.commands),
            run.revision,
        )
        for run in runs.runs
    )
    more = ("metric", "validation", "test", "folder", "command", "revision")
    return Table(tuple(Column(name.replace("_", " ")) for name in (*names, *more)), rows)
