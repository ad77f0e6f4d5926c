"""Changes one thing about DoRA at a time: its parts, ranks, rates of the magnitude, layers, starts.

Each study compares settings. Every setting tries the same learning rates; the best one on the
validation rows is trained with more seeds, and only these runs see the test. The runs that can
share a program are trained at once. Finished runs are kept in the run folder, settings that two
studies have in common are trained once, and the same command goes on where it stopped.

Studies: methods (full fine-tuning, LoRA, DoRA, the magnitude alone), components (parts of DoRA),
ranks (LoRA and DoRA from 1 to 64), half-ranks (DoRA at half the rank of LoRA), magnitude (its
learning rate and decay), eps, layers (attention, MLP or all), batch, bases (kernels as they are,
int8, nf4), initialisations. The task is sarcasm in headlines, which is downloaded, or one of GLUE,
whose published files are given with --data.

Examples:
    python -m experiments.ablation --studies components --dry-run
    python -m experiments.ablation --studies components half-ranks --task sst2 --data glue
    python -m experiments.ablation --studies own --sweep rank=2,8 eps=1e-8,1e-4 method=dora
    python -m experiments.ablation --sweep learning_rate=1e-5..1e-2:12 --seeds 5 --members 8
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from experiments import glue
from experiments.sweeps.choice import Chosen, tune
from experiments.sweeps.estimate import Planned, measure, table
from experiments.sweeps.grid import members, parse_axis
from experiments.sweeps.members import Member, build
from experiments.sweeps.runner import Sweep, SweepSettings, check_trainer
from experiments.sweeps.studies import STUDIES, Study, title_of
from experiments.sweeps.task import SweepTask
from experiments.sweeps.text_task import TextTask
from experiments.tasks.glue.presets import RATES
from experiments.tasks.glue.tables import TASKS
from experiments.tasks.task import load_task
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.progress import tokens_in
from experiments.trainer.run_folder import alone_in
from experiments.trainer.settings import SettingsError, TrainerSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare settings of DoRA on one task."""

    # Any of methods, components, ranks, half-ranks, magnitude, eps, layers, batch, bases,
    # initialisations; own is that of --sweep.
    studies: tuple[str, ...] = ("components",)
    # Values to try, as FIELD=VALUES: of learning_rate for all studies, of others for own. A range
    # is LOW..HIGH:COUNT.
    sweep: tuple[str, ...] = ()

    # sarcasm, or any of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli.
    task: str = "sarcasm"
    # Folder of GLUE's published files, or hub.
    data: Path | None = None
    # A BERT or RoBERTa checkpoint folder in Hugging Face's format. The default is MiniLM.
    checkpoint: Path | None = None
    # Number of training rows. The default is 4,000, or all if there are fewer.
    train_examples: int = 4000
    # Tokens of a row at most; the end of a longer one is cut off. The default is 24 for sarcasm and
    # 128 for GLUE.
    max_length: int | None = None

    # Seeds of each rate; their mean chooses.
    choosing_seeds: int = 2
    # Seeds at the chosen rate, those before included.
    seeds: int = 5
    # Rank of the adapters, where it is not varied.
    rank: int = 8
    # The scaling alpha / rank of the adapters.
    scaling: float = 2.0
    # Passes over the training rows.
    epochs: float = 1.0
    # Rows of a step, where it is not varied.
    batch_size: int = 32

    # Runs that are trained at once, in one program.
    members: int = 4
    # Folder of the finished runs.
    run_folder: Path = Path("runs")
    # Print what would be trained, with parameters, memory and time, and train nothing.
    dry_run: bool = False

    # Devices, precision, and what is recorded of the speed.
    trainer: tyro.conf.OmitArgPrefixes[TrainerSettings] = dataclasses.field(
        default_factory=TrainerSettings
    )

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.studies) - {*STUDIES, "own"}):
            raise SystemExit(f"unknown studies {unknown}: choose from {', '.join(STUDIES)}, own")
        if self.task != "sarcasm" and self.task not in TASKS:
            raise SystemExit(f"unknown task {self.task!r}: sarcasm, or one of {', '.join(TASKS)}")
        if self.task != "sarcasm" and self.data is None:
            raise SystemExit(f"--task {self.task} needs --data, the folder of GLUE's files")
        if self.choosing_seeds < 1 or self.seeds < 1:
            raise SystemExit("give at least one seed")
        try:
            axes = [name for name, _ in map(parse_axis, self.sweep)]
            check_trainer(self.trainer)
        except SettingsError as error:
            raise SystemExit(str(error)) from None
        if ("own" in self.studies) == (set(axes) <= {"learning_rate"}):
            raise SystemExit("--studies own and a --sweep of what it varies need each other")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that every setting tries."""
        return dict(map(parse_axis, self.sweep)).get("learning_rate", RATES)

    @property
    def usual(self) -> Member:
        """The setting that studies vary."""
        rank = self.rank
        return Member(rank=rank, alpha=self.scaling * rank, batch_size=self.batch_size)

    def study(self, name: str) -> Study:
        """Returns a study by its name."""
        if name != "own":
            return STUDIES[name]
        axes = dict(map(parse_axis, self.sweep))
        axes.pop("learning_rate", None)
        return Study("settings of --sweep", (axes,))

    def settings_of(self, name: str) -> list[Member]:
        """Returns the settings of a study; their rates and seeds are any."""
        grids = (members(self.usual, axes, (0,)) for axes in self.study(name).axes)
        return list(dict.fromkeys(member for grid in grids for member in grid))


def task_of(config: Config) -> SweepTask:
    """Loads the task.

    Raises:
        DownloadError, DatasetError: Its files are missing or damaged.
    """
    if config.task == "sarcasm":
        length, rows = config.max_length or 24, min(4000, config.train_examples)
        loaded = load_task(max_length=length, train=rows, checkpoint=config.checkpoint)
        base = "MiniLM" if config.checkpoint is None else config.checkpoint.name
        return TextTask(loaded, base=base, switches=config.trainer.switches(loaded.model))
    assert config.data is not None  # checked by Config
    of_glue = glue.Config(
        data=config.data,
        tasks=(config.task,),
        checkpoint=config.checkpoint,
        train_examples=config.train_examples,
        max_length=config.max_length,
        trainer=config.trainer,
    )
    return glue.load_task(of_glue, config.task)


def sweep_of(config: Config, task: SweepTask) -> Sweep:
    """Returns the sweep that trains and keeps the runs."""
    return Sweep(
        task,
        SweepSettings(
            experiment="ablation",
            folder=config.run_folder,
            epochs=config.epochs,
            members=config.members,
            microbatches=config.trainer.microbatches,
            usual=config.usual,
            task_settings={"dtype": config.trainer.dtype},
        ),
    )


def table_of(study: Study, found: dict[Member, Chosen], metric: str) -> str:
    """Returns the results of a study as Markdown, with published figures where there are any."""
    published = f" {study.source} |" if study.published else ""
    lines = [
        f"**{study.title}**",
        "",
        f"| setting | test {metric}, mean ± std (%) | seeds | validation (%) | learning rate | "
        f"trainable parameters |{published}",
        "|---|---|---|---|---|---|" + ("---|" if study.published else ""),
    ]
    for member, own in found.items():
        scores = [100 * scores[metric] for scores in own.test]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        validation = own.validation[own.learning_rate]
        shown = "diverged" if validation is None else f"{100 * validation:.2f}"
        edge = " (edge of the grid)" if own.at_edge else ""
        line = (
            f"| {title_of(member, study)} | {statistics.fmean(scores):.2f}{spread} | "
            f"{len(scores)} | {shown} | {own.learning_rate:g}{edge} | "
            f"{own.summaries[0]['trainable_parameters']:,} |"
        )
        if study.published:
            figure = study.published.get((member.method, member.rank))
            line += " |" if figure is None else f" {figure} |"
        lines.append(line)
    return "\n".join(lines)


def dry_run(config: Config) -> str:
    """Returns what the studies would take. Takes two steps of one run of each program for that."""
    config.trainer.set_up()
    task = task_of(config)
    sweep, costs, rows = sweep_of(config, task), {}, {}
    runs = len(config.rates) * config.choosing_seeds
    runs += max(0, config.seeds - config.choosing_seeds)
    for name in config.studies:
        for member in config.settings_of(name):
            if member in rows:
                continue
            batch = next(task.batches(0, member.batch_size))
            schedule, family = sweep.settings.schedule(task, member.batch_size), member.family(task)
            if family not in costs:
                parts = config.trainer.microbatches
                costs[family] = measure(task, member, schedule, batch, microbatches=parts)
            own = sum(x.size for x in jax.tree.leaves(build(task, member).trained))
            cost = dataclasses.replace(costs[family], parameters=own)
            title, tokens = title_of(member, config.study(name)), float(tokens_in(batch))
            planned = Planned(name, title, runs, schedule.steps, tokens, config.members, cost)
            rows[member] = planned
    return table(list(rows.values()))


def run(config: Config) -> str:
    """Trains the unfinished runs; prints a table after each study, and returns all as Markdown."""
    config.trainer.set_up()
    with alone_in(config.run_folder):
        task = task_of(config)
        sweep, tables = sweep_of(config, task), []
        for name in config.studies:
            study, own = config.study(name), config.settings_of(name)
            print(f"{study.title}: {len(own)} settings", flush=True)
            found = tune(sweep, own, config.rates, config.choosing_seeds, config.seeds)
            tables.append(table_of(study, found, task.metric))
            print(tables[-1], flush=True)
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        if config.dry_run:
            print(dry_run(config))
        else:
            run(config)


if __name__ == "__main__":
    main()
