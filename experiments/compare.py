"""Compares full fine-tuning, LoRA, DoRA and its ablations on one task, under equal conditions.

Every method has the same data, steps and grid of learning rates. The first seed chooses the
learning rate on the validation texts. Then all seeds are trained at that rate, and only these runs
are evaluated on the test texts. Finished runs are kept in the run folder, so an interrupted
comparison continues with the first unfinished run. With the default settings it takes about an
hour on two CPU cores.

Examples:
    python -m experiments.compare
    python -m experiments.compare --methods lora dora --seeds 1 --learning-rates 6e-4 2e-3
    python -m experiments.compare --mesh data=4 --run-folder runs/compare-4-devices
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.tasks.task import Task, load_task
from experiments.tasks.text import train_batches
from experiments.trainer.classification import cross_entropy
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.finite import check_finite
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.methods import METHODS
from experiments.trainer.placement import place, place_batch
from experiments.trainer.plots import plot_comparison
from experiments.trainer.run_folder import alone_in
from experiments.trainer.runs import Run, RunSettings
from experiments.trainer.settings import TrainerSettings
from experiments.trainer.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare methods of fine-tuning."""

    # Any of full, lora, dora, dora-frozen-magnitude, dora-not-normalized, dora-detached, magnitude.
    methods: tuple[str, ...] = tuple(METHODS)
    # Number of seeds. The first one, 0, chooses the learning rate.
    seeds: int = 3
    # Peak learning rates that every method tries.
    learning_rates: tuple[float, ...] = (6e-5, 2e-4, 6e-4, 2e-3, 6e-3)

    # Rank of the adapters.
    rank: int = 8
    # The scaling of the adapters is alpha / rank.
    alpha: float = 16.0
    # Learning rate of the magnitude over that of the factors.
    magnitude_lr_ratio: float = 3.0

    # Passes over the training texts.
    epochs: int = 1
    # Texts in a step.
    batch_size: int = 32

    # A BERT or RoBERTa checkpoint folder in Hugging Face's format. The default is MiniLM.
    checkpoint: Path | None = None
    # Number of training texts, up to 4,000.
    train_examples: int = 4000
    # Tokens per text. 2 % of the headlines are longer than 24, and their end is cut off.
    max_length: int = 24

    # Timed steps of each method, after training; 0 turns the timing off.
    timed_steps: int = 20
    # Folder of the finished runs.
    run_folder: Path = Path("runs/compare")
    # Folder of the table (Markdown), the figures (JSON) and the plot (PNG). The default is the run
    # folder.
    results_folder: Path | None = None

    # Devices, precision, and what is recorded of the speed.
    trainer: tyro.conf.OmitArgPrefixes[TrainerSettings] = dataclasses.field(
        default_factory=TrainerSettings
    )

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise SystemExit(f"unknown methods {sorted(unknown)}: choose from {list(METHODS)}")
        if self.seeds < 1 or not self.learning_rates or not self.methods:
            raise SystemExit("give at least one method, one seed and one learning rate")

    def run_of(self, method: str, learning_rate: float, seed: int) -> Run:
        """Returns a training run of the comparison; its folder lies in the run folder."""
        shared = {field.name for field in dataclasses.fields(RunSettings)} & vars(self).keys()
        settings = RunSettings(
            method=method,
            learning_rate=learning_rate,
            seed=seed,
            **{name: getattr(self, name) for name in shared},
        )
        return Run(settings, self.run_folder / f"{method}_lr-{learning_rate:g}_seed-{seed}")


def choose_learning_rate(
    config: Config, method: str, task: Task
) -> tuple[float, dict[float, float]]:
    """Returns the learning rate with the best validation accuracy, and the accuracy of each.

    Of two rates with equal accuracy, the one with the lower loss is better.
    """
    results = {}
    for i, rate in enumerate(config.learning_rates, 1):
        run = config.run_of(method, rate, seed=0)
        title = f"{method}, learning rate {rate:g} ({i}/{len(config.learning_rates)})"
        results[rate] = (run.result() or run.train(task, title))["validation"]
    best = max(results, key=lambda rate: (results[rate]["accuracy"], -results[rate]["loss"]))
    return best, {rate: result["accuracy"] for rate, result in results.items()}


def run_method(config: Config, method: str, task: Task) -> dict[str, Any]:
    """Chooses the learning rate, trains all seeds with it, and returns a row of the table."""
    rate, validation = choose_learning_rate(config, method, task)
    accuracies, result = [], {}
    for seed in range(config.seeds):
        run = config.run_of(method, rate, seed)
        result = run.result() or run.train(task, f"{method}, seed {seed + 1}/{config.seeds}")
        accuracies.append(run.test_accuracy(task))
    return {
        "title": METHODS[method].title,
        "learning_rate": rate,
        "validation_by_learning_rate": validation,
        "test_accuracies": accuracies,
        "test_accuracy_mean": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "trainable_parameters": result["trainable_parameters"],
    }


def time_steps(config: Config, task: Task) -> dict[str, dict[str, float]]:
    """Times training steps of all methods, one of each in every round.

    Returns:
        By method: the median seconds per step, and the median of the ratios to the step of the
        first method in the same round.
    """
    rate = config.learning_rates[0]
    built = {m: config.run_of(m, rate, seed=0).build(task) for m in config.methods}
    mesh, steps = config.trainer.device_mesh(), {}
    for method, (model, optimizer) in built.items():
        if mesh is not None:
            place(model, optimizer, mesh)
        model.train()  # as in `fit`, so that it is the same program
        microbatches = config.trainer.microbatches
        steps[method] = TrainStep(model, optimizer, cross_entropy, microbatches=microbatches)
    tokens, labels = task.train.tokens, task.train.labels
    batches = train_batches(tokens, labels, config.batch_size, seed=0)
    seconds: dict[str, list[float]] = {method: [] for method in built}
    order = list(built)
    for number in range(1, 3 + config.timed_steps):  # the first two compile and warm up
        batch = next(batches) if mesh is None else place_batch(next(batches), mesh)
        for method in order:
            start = time.perf_counter()
            loss, _, squares = jax.block_until_ready(steps[method](batch))
            seconds[method].append(time.perf_counter() - start)
            model, optimizer = built[method]
            check_finite(number, float(loss), np.asarray(squares), model, optimizer.wrt)
        order.append(order.pop(0))  # no method always follows the same one
    first = np.array(seconds[config.methods[0]][2:])
    return {
        method: {
            "seconds_per_step": float(np.median(times[2:])),
            "ratio_to_first": float(np.median(np.array(times[2:]) / first)),
        }
        for method, times in seconds.items()
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        "| method | test accuracy, mean ± std (%) | by seed (%) | learning rate | "
        "trainable parameters | s/step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        std = row["test_accuracy_std"]
        spread = "" if std is None else f" ± {100 * std:.2f}"
        seeds = ", ".join(f"{100 * a:.2f}" for a in row["test_accuracies"])
        timing = row.get("seconds_per_step")
        lines.append(
            f"| {row['title']} | {100 * row['test_accuracy_mean']:.2f}{spread} | {seeds} | "
            f"{row['learning_rate']:g} | {row['trainable_parameters']:,} | "
            f"{'' if timing is None else f'{timing:.3f}'} |"
        )
    return "\n".join(lines)


def report(config: Config, task: Task, rows: dict[str, dict[str, Any]], folder: Path) -> str:
    """Writes compare.md, compare.json and compare.png, and returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    command = "python -m experiments.compare " + shlex.join(sys.argv[1:])
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind} ({jax.default_backend()})"
    edge = [
        row["title"]
        for row in rows.values()
        if row["learning_rate"] in (min(config.learning_rates), max(config.learning_rates))
    ]
    accuracy = statistics.fmean(row["test_accuracy_mean"] for row in rows.values())
    standard_error = (accuracy * (1 - accuracy) / len(task.test)) ** 0.5
    text = "\n".join(
        [
            "# Methods compared: sarcasm in headlines, MiniLM",
            "",
            f"Made by `{command.strip()}` with jax {jax.__version__} on {machine}.",
            "",
            f"{len(task.train)} training, {len(task.validation)} validation, {len(task.test)} test "
            f"texts of at most {config.max_length} tokens; {config.epochs} epoch(s) of batch "
            f"{config.batch_size}; rank {config.rank}, alpha {config.alpha:g}, magnitude learning "
            f"rate {config.magnitude_lr_ratio:g} x; AdamW, linear warm-up, cosine decay, clipped "
            f"to norm 1. Learning rate of each method from "
            f"{', '.join(f'{r:g}' for r in config.learning_rates)} on the validation texts with "
            f"seed 0. Most frequent class: {100 * task.majority:.1f} %. The choice of test texts "
            f"alone gives a standard error of {100 * standard_error:.1f} points.",
            "",
            table(rows),
            "",
            *([f"Chosen at an edge of the grid: {', '.join(edge)}.", ""] if edge else []),
            "s/step: median of steps taken in turn in one process.",
            "",
            "![results](compare.png)",
            "",
        ]
    )
    (folder / "compare.md").write_text(text, encoding="utf-8")
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    fields["trainer"] = config.trainer.changes_results
    figures = {"command": command, "machine": machine, "config": fields, "results": rows}
    (folder / "compare.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot_comparison(rows, folder / "compare.png")
    return text


def run(config: Config) -> str:
    """Trains the unfinished runs, writes the report and returns its Markdown."""
    config.trainer.set_up()
    with alone_in(config.run_folder):
        return _run(config)


def _run(config: Config) -> str:
    task = load_task(
        max_length=config.max_length, train=config.train_examples, checkpoint=config.checkpoint
    )
    rows = {}
    for i, method in enumerate(config.methods, 1):
        print(f"[{i}/{len(config.methods)}] {METHODS[method].title}", flush=True)
        rows[method] = run_method(config, method, task)
        print(table({method: rows[method]}), flush=True)
    if config.timed_steps:
        print("Timing steps of all methods in turn", flush=True)
        for method, timing in time_steps(config, task).items():
            rows[method].update(timing)
    return report(config, task, rows, config.results_folder or config.run_folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        print(run(config))


if __name__ == "__main__":
    main()
