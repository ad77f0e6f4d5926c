"""Compares full fine-tuning, LoRA, DoRA and its ablations on one task, fairly.

Every method has the same data, steps and learning-rate grid. Its learning rate is chosen on the
validation texts with the first seed; all seeds are then trained at that rate, and the test texts
are looked at for those runs alone. Finished runs are kept in the run folder, so an interrupted
comparison goes on where it stopped. With the default settings: about an hour on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import functools
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
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure

from experiments.data.text import train_batches
from experiments.memory import keep_freed_memory
from experiments.methods import METHODS
from experiments.metrics import MetricsWriter
from experiments.task import Task, load_task
from experiments.training import Schedule, count, evaluate, fit, logits_of, train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare methods of fine-tuning."""

    # Any of full, lora, dora, dora-frozen-magnitude, dora-not-normalized.
    methods: tuple[str, ...] = tuple(METHODS)
    # How many seeds; the first, 0, chooses the learning rate.
    seeds: int = 3
    # Peak learning rates tried for every method.
    learning_rates: tuple[float, ...] = (6e-5, 2e-4, 6e-4, 2e-3, 6e-3)

    # Adapter
    rank: int = 8
    alpha: float = 16.0
    magnitude_lr_ratio: float = 3.0

    # Schedule
    epochs: int = 1
    batch_size: int = 32

    # Data
    # A BERT or RoBERTa checkpoint folder in Hugging Face's format; by default MiniLM.
    checkpoint: Path | None = None
    train_examples: int = 4000
    max_length: int = 24

    # Steps per method for the interleaved timing; 0 leaves it out.
    timed_steps: int = 20
    # Where finished runs are kept.
    run_folder: Path = Path("runs/compare")
    # Where the table (Markdown), figures (JSON) and plot (PNG) go; by default the run folder.
    results_folder: Path | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise SystemExit(f"unknown methods {sorted(unknown)}; there are {list(METHODS)}")
        if self.seeds < 1 or not self.learning_rates or not self.methods:
            raise SystemExit("needs at least one method, one seed and one learning rate")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, known by what it depends on; its results lie in a folder of its own."""

    config: Config
    method: str
    learning_rate: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """What the run's result depends on."""
        shared = ("rank", "alpha", "magnitude_lr_ratio", "epochs", "batch_size", "train_examples")
        settings = {name: getattr(self.config, name) for name in (*shared, "max_length")}
        own: dict[str, Any] = {"method": self.method, "learning_rate": self.learning_rate}
        own["seed"] = self.seed
        if self.config.checkpoint is not None:
            own["checkpoint"] = str(self.config.checkpoint)
        return settings | own

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        name = f"{self.method}_lr-{self.learning_rate:g}_seed-{self.seed}"
        return self.config.run_folder / name

    def result(self) -> dict[str, Any] | None:
        """What the run gave; None if it has not finished.

        Raises:
            SystemExit: The folder holds a run of other settings.
        """
        file = self.folder / "result.json"
        if not file.exists():
            return None
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["settings"] != self.settings:
            raise SystemExit(
                f"{self.folder} holds a run of other settings: choose another --run-folder"
            )
        return result

    def test_accuracy(self, task: Task) -> float:
        """Test accuracy, from the logits that the finished run left."""
        logits = np.load(self.folder / "test_logits.npy")
        return float((logits.argmax(-1) == task.test.labels).mean())

    def train(self, task: Task, title: str) -> dict[str, Any]:
        """Trains, and leaves the result and the test texts' logits (not looked at here)."""
        model, optimizer = self.build(task)
        schedule = self.schedule()
        metrics = self.folder / f"metrics-{time.time_ns()}"  # of this attempt
        with MetricsWriter(metrics) as writer:
            fit(model, optimizer, task.train, task.validation, schedule, writer, title=title)
        np.save(self.folder / "test_logits.npy", logits_of(model, task.test))
        result = {
            "settings": self.settings,
            "validation": evaluate(model, task.validation),
            "trainable_parameters": count(model, METHODS[self.method].trainable),
        }
        unfinished = self.folder / "result.json.part"
        unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "result.json")
        return result

    def build(self, task: Task) -> tuple[nnx.Module, nnx.Optimizer]:
        """Returns the model, adapted where the method does, and its optimiser."""
        method, config = METHODS[self.method], self.config
        model = method.adapt(
            task.model(self.seed), rank=config.rank, alpha=config.alpha, seed=1000 + self.seed
        )
        steps = self.config.epochs * self.schedule().steps_per_epoch(task.train)
        tx = _optimizer(self.method, self.config, self.learning_rate, steps)
        return model, nnx.Optimizer(model, tx, wrt=method.trainable)

    def schedule(self) -> Schedule:
        """The run's schedule."""
        config = self.config
        return Schedule(self.learning_rate, config.epochs, config.batch_size, seed=self.seed)


@functools.cache
def _optimizer(
    method: str, config: Config, learning_rate: float, steps: int
) -> optax.GradientTransformation:
    """One optimiser for all seeds: a new one would be compiled anew."""
    schedule = Schedule(learning_rate, config.epochs, config.batch_size).over(steps)
    return METHODS[method].optimizer(schedule, config.magnitude_lr_ratio)


def choose_learning_rate(
    config: Config, method: str, task: Task
) -> tuple[float, dict[float, float]]:
    """Returns the learning rate of the best validation accuracy, and the accuracy of each.

    The lower loss decides between equal accuracies.
    """
    results = {}
    for i, rate in enumerate(config.learning_rates, 1):
        run = Run(config, method, rate, seed=0)
        title = f"{method}, learning rate {rate:g} ({i}/{len(config.learning_rates)})"
        results[rate] = (run.result() or run.train(task, title))["validation"]
    best = max(results, key=lambda rate: (results[rate]["accuracy"], -results[rate]["loss"]))
    return best, {rate: result["accuracy"] for rate, result in results.items()}


def run_method(config: Config, method: str, task: Task) -> dict[str, Any]:
    """Chooses the learning rate, trains all seeds at it, and returns a row of the table."""
    rate, validation = choose_learning_rate(config, method, task)
    accuracies, result = [], {}
    for seed in range(config.seeds):
        run = Run(config, method, rate, seed)
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
    """Times a training step of every method, in turn, in this process.

    Returns:
        By method: median seconds per step, and the median of its ratio to the first method's step
        of the same round.
    """
    built = {
        m: Run(config, m, config.learning_rates[0], seed=0).build(task) for m in config.methods
    }
    tokens, labels = task.train.tokens, task.train.labels
    batches = train_batches(tokens, labels, config.batch_size, seed=0)
    seconds: dict[str, list[float]] = {method: [] for method in built}
    order = list(built)
    for _ in range(2 + config.timed_steps):  # the first two compile and warm up
        batch = next(batches)
        for method in order:
            model, optimizer = built[method]
            start = time.perf_counter()
            jax.block_until_ready((train_step(model, optimizer, batch), nnx.state(optimizer)))
            seconds[method].append(time.perf_counter() - start)
        order.append(order.pop(0))  # none always comes after the same one
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
    """Writes compare.md, compare.json and compare.png; returns the Markdown."""
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
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    figures = {"command": command, "machine": machine, "config": settings, "results": rows}
    (folder / "compare.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot(rows, folder / "compare.png")
    return text


def plot(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Draws test accuracy by method, and validation accuracy by learning rate."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    test, validation = figure.subplots(1, 2)
    for i, row in enumerate(rows.values()):
        accuracies = 100 * np.array(row["test_accuracies"])
        std = 100 * (row["test_accuracy_std"] or 0.0)
        test.errorbar(i, accuracies.mean(), yerr=std, fmt="o", color=f"C{i}", capsize=5)
        test.plot(np.full(len(accuracies), i + 0.15), accuracies, ".", color=f"C{i}", alpha=0.5)
        by_rate = row["validation_by_learning_rate"]
        rates = [float(rate) for rate in by_rate]
        values = [100 * accuracy for accuracy in by_rate.values()]
        validation.semilogx(rates, values, "o-", color=f"C{i}", label=row["title"])
    test.set(title="test accuracy (%): mean ± std, and seeds", xticks=range(len(rows)))
    titles = [row["title"].replace(", ", ",\n").replace(" fine", "\nfine") for row in rows.values()]
    test.set_xticklabels(titles, fontsize=8)
    validation.set(title="validation accuracy (%), first seed", xlabel="peak learning rate")
    validation.legend(fontsize=8)
    for panel in (test, validation):
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def run(config: Config) -> str:
    """Runs what has not been run, and reports; returns the Markdown."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
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
    config = tyro.cli(Config, description=__doc__, args=arguments)
    try:
        print(run(config))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on from here.") from None


if __name__ == "__main__":
    main()
