"""Makes tables and figures from run folders.

Reads every finished run below the given folders, and writes Markdown, CSV, LaTeX and PNGs. Nothing
else goes into the report: a run that is damaged or did not finish is named and left out.

Examples:
    python -m experiments.report runs/glue
    python -m experiments.report runs/glue runs/ablation --output results --reference dora
    python -m experiments.report runs/glue --dry-run
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.reporting.folders import read_runs
from experiments.reporting.results import Report, write_report
from experiments.reporting.variants import variants
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Config:
    """Make tables and figures from run folders."""

    # Folders with runs, however deep.
    run_folders: tyro.conf.Positional[tuple[Path, ...]]
    # Folder of the report. The default is report/ in the first run folder.
    output: Path | None = None
    # The method that others are compared with.
    reference: str = "lora"
    # List the runs that were found and those that are left out, and stop.
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.run_folders:
            raise SystemExit("give at least one run folder")
        if self.reference not in METHODS:
            raise SystemExit(f"unknown method {self.reference!r}: choose from {list(METHODS)}")


def run(config: Config) -> str:
    """Writes the report and returns its Markdown; of a dry run, what it would be made from."""
    runs = read_runs(config.run_folders)
    if config.dry_run:
        lines = [
            f"{v.experiment} {v.task}: {f'{v.title} {v.setting}'.strip()}: {len(v.runs)} runs, "
            f"{len(v.curve)} learning rates, {len(v.final)} seeds at {v.rate:g}"
            for v in variants(runs.runs)
        ]
        return "\n".join([*lines, *runs.problems])
    command = "python -m experiments.report " + shlex.join(sys.argv[1:])
    output = config.output or config.run_folders[0] / "report"
    return write_report(Report(runs, config.reference, command), output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    config = settings(Config, __doc__, arguments)
    with in_one_line("Run the same command again."):
        print(run(config))


if __name__ == "__main__":
    main()
