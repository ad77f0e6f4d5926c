"""How full fine-tuning, LoRA and DoRA move magnitudes and directions, or what a fine-tune did.

Trains each method on one task with several seeds, and measures at checkpoints how far each linear
kernel has moved from the pretrained one: dM and dD of the DoRA paper (section 3.2), and the rank of
the change. The report has the correlations of dD and dM, with intervals, beside the paper's.
Finished runs are kept in the run folder, so that the same command continues after an interruption.
With the default settings it took an hour on two busy CPU cores.

With --folders it trains nothing: it compares two Hugging Face checkpoint folders, tensor by tensor.

Examples:
    python -m experiments.decomposition
    python -m experiments.decomposition --methods lora dora --seeds 5 --learning-rates lora 6e-4
    python -m experiments.decomposition --dry-run
    python -m experiments.decomposition --folders Llama-3.2-1B Llama-3.2-1B-Instruct
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.reporting.checkpoint_folders import compare_folders
from experiments.reporting.decomposition import CHANGES, read_points, write_report
from experiments.reporting.recorder import Recorder
from experiments.tasks.task import Task, load_task
from experiments.trainer.classification import classifier_training, count, evaluate
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.dry_run import seconds_per_step, training_bytes
from experiments.trainer.loop import fit
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.methods import METHODS
from experiments.trainer.run_folder import (
    alone_in,
    finish_run,
    finished_run,
    start_run,
    write_whole,
)
from experiments.trainer.runs import Run, RunSettings
from experiments.trainer.settings import TrainerSettings

# The best for these methods on this task by validation, of 6e-5, 2e-4, 6e-4, 2e-3 and 6e-3.
RATES = {"full": 6e-5, "lora": 2e-3, "dora": 2e-3}
_OTHER_RATE = 2e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure changes of magnitude and direction."""

    # Two Hugging Face checkpoint folders, before and after a fine-tune, to compare: trains nothing.
    folders: tuple[Path, Path] | None = None
    # Print what would be trained, and what it would take, and stop.
    dry_run: bool = False

    # Any of full, lora, dora, dora-frozen-magnitude, dora-not-normalized.
    methods: tuple[str, ...] = ("full", "lora", "dora")
    # Number of seeds: of the head, the adapters and the order of the texts.
    seeds: int = 3
    # Peak learning rates by method. The defaults are the best on this task.
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    # Number of checkpoints at which changes are measured, equally spaced; the last step is one.
    checkpoints: int = 10

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

    # Folder of the finished runs.
    run_folder: Path = Path("runs/decomposition")
    # Folder of the report: Markdown, JSON and figures. The default is the run folder.
    results_folder: Path | None = None

    # Devices, precision, and what is recorded of the speed.
    trainer: tyro.conf.OmitArgPrefixes[TrainerSettings] = dataclasses.field(
        default_factory=TrainerSettings
    )

    def __post_init__(self) -> None:
        if unknown := {*self.methods, *self.learning_rates} - METHODS.keys():
            raise SystemExit(f"unknown methods {sorted(unknown)}: choose from {list(METHODS)}")
        if self.seeds < 1 or self.checkpoints < 1 or not self.methods:
            raise SystemExit("give at least one method, one seed and one checkpoint")

    def run_of(self, method: str, seed: int) -> Run:
        """Returns a training run; its folder lies in the run folder."""
        shared = {field.name for field in dataclasses.fields(RunSettings)} & vars(self).keys()
        rate = self.learning_rates.get(method, RATES.get(method, _OTHER_RATE))
        settings = RunSettings(
            method=method,
            learning_rate=rate,
            seed=seed,
            **{name: getattr(self, name) for name in shared},
        )
        name = f"{method}_r{self.rank}_lr-{rate:g}_seed-{seed}"
        return Run(settings, self.run_folder / "decomposition" / "sarcasm" / name)

    def runs(self) -> list[Run]:
        """Returns all runs, one seed of every method after the other."""
        return [self.run_of(method, seed) for seed in range(self.seeds) for method in self.methods]


def settings_of(config: Config, run: Run) -> dict[str, object]:
    """Returns everything that the result of a run depends on, as JSON."""
    fields = run.settings.as_json()
    model = fields.pop("checkpoint")
    named = {"experiment": "decomposition", "task": "sarcasm", "model": model}
    return named | fields | {"checkpoints": config.checkpoints}


def train(config: Config, run: Run, task: Task, title: str) -> None:
    """Trains a run, and leaves its changes by step and layer in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    start_run(run.folder, settings_of(config, run))
    model, optimizer = run.build(task)
    base = task.model(run.settings.seed, **config.trainer.switches(task.model))
    schedule = run.settings.schedule()
    steps = schedule.epochs * schedule.steps_per_epoch(task.train)
    recorder = Recorder(base, every=max(1, steps // config.checkpoints), steps=steps)
    training = classifier_training(model, optimizer, task, schedule, config.trainer, title=title)
    training = dataclasses.replace(training, evaluate=recorder, evaluate_every=recorder.every)
    fitted = fit(training, run.folder, config.trainer)
    write_whole(run.folder / CHANGES, recorder.lines())
    summary = {
        "validation": evaluate(model, task.validation),
        "metric": "accuracy",
        "trainable_parameters": count(model, METHODS[run.settings.method].trainable),
        "seconds_per_step": fitted.seconds_per_step,
        "members": 1,
        "temporary_bytes": None,
        "forgetting": None,
    }
    finish_run(run.folder, summary)


def describe(config: Config, task: Task) -> str:
    """Returns what would be trained, and what it would take."""
    lines = [f"{len(config.runs())} runs in {config.run_folder}"]
    tokens, total = config.batch_size * config.max_length, 0.0
    for method in config.methods:
        run, trainable = config.run_of(method, 0), METHODS[method].trainable
        model, _ = run.build(task)
        steps = config.epochs * run.settings.schedule().steps_per_epoch(task.train)
        seconds = seconds_per_step(model, trainable, tokens)
        runs = [config.run_of(method, seed) for seed in range(config.seeds)]
        left = [r for r in runs if finished_run(r.folder, settings_of(config, r)) is None]
        total += len(left) * steps * seconds
        lines.append(
            f"{METHODS[method].title}: learning rate {run.settings.learning_rate:g}, {steps} steps "
            f"of {tokens} tokens, {count(model, trainable):,} trainable parameters, "
            f"{training_bytes(model, trainable) / 1e6:,.0f} MB besides activations, about "
            f"{seconds:.2f} s a step; {len(left)} of {config.seeds} seeds are left"
        )
    return "\n".join([*lines, f"At least {total / 60:.0f} minutes, compilation aside."])


def run(config: Config) -> str:
    """Trains the unfinished runs, writes the report and returns its Markdown."""
    config.trainer.set_up()
    if config.folders is not None:
        return compare_folders(*config.folders, config.results_folder or config.run_folder)
    task = load_task(
        max_length=config.max_length, train=config.train_examples, checkpoint=config.checkpoint
    )
    if config.dry_run:
        return describe(config, task)
    with alone_in(config.run_folder):
        runs = config.runs()
        for number, one in enumerate(runs, 1):
            if finished_run(one.folder, settings_of(config, one)) is None:
                title = f"[{number}/{len(runs)}] {one.settings.method}, seed {one.settings.seed}"
                train(config, one, task, title)
        return write_report(
            read_points([one.folder for one in runs]), config.results_folder or config.run_folder
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        print(run(config))


if __name__ == "__main__":
    main()
