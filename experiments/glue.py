"""Fine-tunes a BERT or RoBERTa on the tasks of GLUE, by several methods under equal conditions.

Every method tries the same grid of learning rates. The published test labels are hidden, so the
published validation rows are cut in two: one half chooses the rate, as the mean over some seeds,
and the other half is the test. More seeds are trained at the chosen rate, and only these runs see
the test. Finished runs are kept in the run folder, and the same command goes on where it stopped.

The preset `small` runs MiniLM on two CPU cores. The preset `paper` runs RoBERTa-base, whose
folder is given with --checkpoint. GLUE's published files are given with --data: a folder with
SST-2/train.tsv and the like, or with sst2/train-*.parquet; `--data hub` asks the Hugging Face hub.

Examples:
    python -m experiments.glue --data glue --dry-run
    python -m experiments.glue --data glue --tasks sst2 --methods lora:8 dora:8
    python -m experiments.glue --preset paper --data glue --checkpoint roberta-base --tasks mnli
    python -m experiments.glue --data glue --tasks qnli-dev --run-folder runs/qnli-dev
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from experiments.sweeps.choice import tune
from experiments.sweeps.estimate import Planned, measure, table
from experiments.sweeps.members import Member
from experiments.sweeps.runner import Sweep, SweepSettings, check_trainer
from experiments.tasks.download import minilm_folder
from experiments.tasks.glue.presets import EPOCHS, PRESETS, Preset
from experiments.tasks.glue.splits import load_splits
from experiments.tasks.glue.sweep_task import EncoderSettings, GlueSweepTask
from experiments.tasks.glue.tables import TASKS
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.methods import METHODS
from experiments.trainer.run_folder import alone_in
from experiments.trainer.settings import TrainerSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune an encoder on GLUE. Options that are not given are those of the preset."""

    # Folder of GLUE's published files, or hub.
    data: Path
    # Settings of all that is not given.
    preset: Literal["small", "paper"] = "small"
    # A BERT or RoBERTa checkpoint folder in Hugging Face's format. The default is MiniLM.
    checkpoint: Path | None = None

    # Any of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; qnli-dev is QNLI's validation rows
    # alone, cut in three.
    tasks: tuple[str, ...] | None = None
    # Methods, with the rank after a colon: full, lora:8, dora:4, magnitude and so on.
    methods: tuple[str, ...] | None = None
    # Peak learning rates that every method tries.
    rates: tuple[float, ...] | None = None
    # Seeds of each rate; their mean chooses.
    choosing_seeds: int | None = None
    # Seeds at the chosen rate, those before included.
    seeds: int | None = None

    # The scaling alpha / rank of the adapters.
    scaling: float = 2.0
    # Learning rate of the magnitude over that of the factors.
    magnitude_lr_ratio: float = 3.0

    # Passes over the training rows.
    epochs: float | None = None
    # Number of training rows. The default is all, and 4,000 of SST-2 in the preset small.
    train_examples: int | None = None
    # Rows of a step.
    batch_size: int | None = None
    # Tokens of a row at most; the end of a longer one is cut off.
    max_length: int | None = None
    # Dropout rate of the encoder; the preset small has none, paper that of the checkpoint.
    dropout: float | None = None
    # Seed of the cut of the validation rows, and of the training rows if they are not all.
    split_seed: int = 0

    # Runs that are trained at once, in one program.
    members: int | None = None
    # The same of full fine-tuning, whose runs share no weights.
    full_members: int = 1
    # Folder of the finished runs.
    run_folder: Path = Path("runs")
    # Print what would be trained, with parameters, memory and time, and train nothing.
    dry_run: bool = False

    # Devices, precision, and what is recorded of the speed.
    trainer: tyro.conf.OmitArgPrefixes[TrainerSettings] = dataclasses.field(
        default_factory=TrainerSettings
    )

    def __post_init__(self) -> None:
        chosen = self.resolved()
        if unknown := sorted(set(chosen.tasks) - set(TASKS)):
            raise SystemExit(f"unknown tasks {unknown}: choose from {', '.join(TASKS)}")
        for method in chosen.methods:
            member_of(self, method)
        if min(chosen.choosing_seeds, chosen.seeds, len(chosen.rates), len(chosen.tasks)) < 1:
            raise SystemExit("give at least one task, one seed and one learning rate")
        if self.preset == "paper" and self.checkpoint is None:
            raise SystemExit("--preset paper needs --checkpoint, the folder of RoBERTa-base")

    def resolved(self) -> Preset:
        """Returns the preset with the options that were given in its place."""
        preset = PRESETS[self.preset]
        names = {field.name for field in dataclasses.fields(Preset)} & vars(self).keys()
        given = {name: getattr(self, name) for name in names - {"epochs", "train_examples"}}
        given = {name: value for name, value in given.items() if value is not None}
        tasks = given.get("tasks", preset.tasks)
        for name in ("epochs", "train_examples"):
            if (value := getattr(self, name)) is not None:
                given[name] = dict.fromkeys(tasks, value)
        if self.checkpoint is not None:
            given["model"] = self.checkpoint.name
        return dataclasses.replace(preset, **given)


def member_of(config: Config, method: str) -> Member:
    """Returns a run of a method; its rate and seed are any.

    Raises:
        SystemExit: The method is not known, or has no rank where it needs one.
    """
    name, _, rank = method.partition(":")
    size = int(rank) if rank.isdecimal() else 0 if rank else 8
    if name not in METHODS or not size:
        raise SystemExit(f"unknown method {method!r}: give one of {', '.join(METHODS)}, as dora:8")
    return Member(
        method=name,
        rank=size,
        alpha=config.scaling * size,
        magnitude_lr_ratio=config.magnitude_lr_ratio,
        batch_size=config.resolved().batch_size,
    )


def load_task(config: Config, key: str) -> GlueSweepTask:
    """Reads a task and tokenises it.

    Raises:
        DatasetError: Its files are missing or damaged.
    """
    preset, task = config.resolved(), TASKS[key]
    encoder = EncoderSettings(
        folder=config.checkpoint or minilm_folder(),
        name=preset.model,
        max_length=preset.max_length,
        pooling=preset.pooling,
        dropout=preset.dropout,
        **config.trainer.switches(lambda dtype: None),
    )
    count = preset.train_examples.get(key)
    splits = load_splits(task, config.data, train_examples=count, split_seed=config.split_seed)
    loaded = GlueSweepTask(task, splits, encoder)
    broken = f", {splits.train.left_out} broken rows left out" if splits.train.left_out else ""
    print(
        f"{task.folder}{' (validation rows alone, cut in three)' if task.from_development else ''}"
        f": {len(splits.train):,} rows to train on, {len(splits.validation):,} to choose, "
        f"{len(splits.test):,} to test; {loaded.truncated} cut to {preset.max_length} tokens; "
        f"batches of {', '.join(map(str, loaded.buckets))} tokens{broken}",
        flush=True,
    )
    return loaded


def sweep_of(config: Config, task: GlueSweepTask) -> Sweep:
    """Returns the sweep that trains and keeps the runs of a task."""
    preset = config.resolved()
    return Sweep(
        task,
        SweepSettings(
            experiment="glue",
            folder=config.run_folder,
            epochs=preset.epochs.get(task.name, EPOCHS),
            warmup=preset.warmup,
            decay=preset.decay,
            members=preset.members,
            full_members=config.full_members,
            microbatches=config.trainer.microbatches,
            usual=member_of(config, "dora:8"),
            task_settings={
                "pooling": preset.pooling,
                "dropout": preset.dropout,
                "buckets": list(task.buckets),
                "split_seed": config.split_seed,
                "dtype": config.trainer.dtype,
            },
        ),
    )


def run_method(
    config: Config, sweep: Sweep, method: str, rates: Sequence[float]
) -> tuple[float, str]:
    """Tries the rates, trains the seeds at the best one, and tests these.

    Returns:
        The chosen rate, and a line of the table.
    """
    preset, setting = config.resolved(), member_of(config, method)
    found = tune(sweep, [setting], rates, preset.choosing_seeds, preset.seeds)[setting]
    names = [name for name in found.test[0] if name not in ("loss", "examples")]
    figures = ", ".join(f"{name} {_mean([own[name] for own in found.test])}" for name in names)
    edge = " (edge of those tried)" if found.at_edge else ""
    title = METHODS[setting.method].title + (f" r{setting.rank}" if setting.rank else "")
    one = found.summaries[0]
    step = "" if one["seconds_per_step"] is None else f"{one['seconds_per_step']:.3f}"
    return found.learning_rate, (
        f"| {sweep.task.name} | {title} | {figures} | {len(found.test)} | "
        f"{found.learning_rate:g}{edge} | {one['trainable_parameters']:,} | {step} |"
    )


def _mean(scores: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{100 * statistics.fmean(scores):.2f}{spread}"


def dry_run(config: Config) -> str:
    """Returns what the experiment would take. Takes two steps of one run of each method for that.

    They are taken on the longest batches of the first task. Rates next to those chosen before are
    counted as if the middle of the grid had been chosen.
    """
    check_trainer(config.trainer)
    config.trainer.set_up()
    preset, rows = config.resolved(), []
    tasks = {key: load_task(config, key) for key in preset.tasks}
    first, middle = tasks[preset.tasks[0]], preset.rates[len(preset.rates) // 2]
    costs = {}
    for method in preset.methods:
        member, sweep = member_of(config, method), sweep_of(config, first)
        batch, schedule = (
            first.longest_batch(preset.batch_size),
            sweep.settings.schedule(first, preset.batch_size),
        )
        parts = config.trainer.microbatches
        print(f"compiling {method}, and taking two steps", file=sys.stderr, flush=True)
        costs[method] = measure(first, member, schedule, batch, microbatches=parts)
    for i, (key, task) in enumerate(tasks.items()):
        rates = preset.rates_of(key, dict.fromkeys(preset.tasks[:i], middle))
        runs = len(rates) * preset.choosing_seeds + max(0, preset.seeds - preset.choosing_seeds)
        steps = sweep_of(config, task).settings.schedule(task, preset.batch_size).steps
        tokens = preset.batch_size * task.mean_batch_length(preset.batch_size)
        for method, cost in costs.items():
            at_once = config.full_members if method == "full" else preset.members
            rows.append(Planned(key, method, runs, steps, tokens, at_once, cost))
    return table(rows)


HEADER = (
    "| task | method | test, mean ± std over seeds (%) | seeds | learning rate | "
    "trainable parameters | s/step |\n|---|---|---|---|---|---|---|"
)


def run(config: Config) -> str:
    """Trains the unfinished runs, and returns the table as Markdown."""
    check_trainer(config.trainer)
    config.trainer.set_up()
    preset = config.resolved()
    with alone_in(config.run_folder):
        rows: list[str] = []
        chosen: dict[str, dict[str, float]] = {method: {} for method in preset.methods}
        for key in preset.tasks:
            sweep = sweep_of(config, load_task(config, key))
            for method in preset.methods:
                start, rates = time.monotonic(), preset.rates_of(key, chosen[method])
                chosen[method][key], row = run_method(config, sweep, method, rates)
                rows.append(row)
                print(f"{row}\n{time.monotonic() - start:.0f} s", flush=True)
    return "\n".join([HEADER, *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        print(dry_run(config) if config.dry_run else run(config))


if __name__ == "__main__":
    main()
