r"""Compares LoRA and DoRA on the commonsense tasks of the DoRA paper, with a decoder.

The preset small fine-tunes SmolLM2-135M on the train files of BoolQ, ARC and OBQA, and tests on
the paper's test files of seven tasks. A model of this size cannot follow the paper's format, in
which it writes the number of the answer. So it is trained on the answer's text, and the text that
it finds most likely counts as its answer: by token (accuracy), and in the sum (accuracy_sum). The
other presets are the paper's: commonsense_170k, three epochs, answers that are generated.

Each method is trained at each learning rate; the mean accuracy on validation rows, cut from the
train files, chooses one. Its runs with all seeds are then tested, once. Finished runs are kept in
the run folder, and an interrupted run continues from its checkpoint.

Give --data the folder of the published files: boolq/train.json, boolq/test.json, ARC-Easy/test.json
and so on, and commonsense_170k.json for the paper's presets.

Examples:
    python -m experiments.commonsense --data dataset --dry-run
    python -m experiments.commonsense --data dataset
    python -m experiments.commonsense --data dataset --seeds 1 --learning-rates 6e-4
    python -m experiments.commonsense --data dataset --base nf4
    python -m experiments.commonsense --data dataset --preset llama-7b --rank 32 \
        --checkpoint llama-7b-hf --mesh fsdp=16 --dtype bfloat16 --remat save_scaled
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from tokenizers import Tokenizer

import dora_jax as dora
from experiments.language.experiment import Design, Experiment
from experiments.language.material import CommonsenseRows, load_material
from experiments.language.plan import plan_text
from experiments.language.presets import PRESETS, PUBLISHED_ROWS, PUBLISHED_TEST_ROWS, Preset
from experiments.language.runs import Recipe
from experiments.language.table import table
from experiments.models.huggingface import load_llama
from experiments.models.llama_config import LlamaConfig
from experiments.models.smollm import smollm2_folder
from experiments.planning.models import MODELS
from experiments.tasks.commonsense import TASKS
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.methods import METHODS, Base
from experiments.trainer.run_folder import alone_in, write_whole
from experiments.trainer.settings import TrainerSettings

TITLES = {key: task.title for key, task in TASKS.items()}
"""The names of the tasks in the table, in the paper's order."""

_SHAPES = {"llama2-7b": "llama-7b"}  # of the same sizes


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare methods on the commonsense tasks. Options that are left out are the preset's."""

    # Folder of the published files.
    data: Path
    # What is trained and tested: small for two CPU cores, the others as in the paper.
    preset: Literal["small", "llama-7b", "llama-13b", "llama2-7b", "llama3-8b"] = "small"
    # A LLaMA checkpoint folder in Hugging Face's format. The default of small is SmolLM2-135M.
    checkpoint: Path | None = None
    # Methods with adapters, such as lora, dora and dora-frozen-magnitude.
    methods: tuple[str, ...] = ("lora", "dora")
    # Whether rows are instructions, answered with a number, or texts to choose from.
    form: Literal["instruction", "text"] | None = None
    # Whether answers to instructions are generated, or the most likely one counts.
    evaluation: Literal["generation", "likelihood"] | None = None
    # Rank of the adapters; alpha is twice the rank.
    rank: int = 16
    # What the linear kernels lie in: as they are, or quantised (QDoRA).
    base: Base = "float"

    # Peak learning rates that every method tries.
    learning_rates: tuple[float, ...] | None = None
    # Seeds of each rate, if there are several rates.
    choosing_seeds: int | None = None
    # Seeds at the chosen rate, the choosing ones included.
    seeds: int | None = None

    # Passes over the training rows.
    epochs: float | None = None
    # Rows of a step.
    batch_size: int | None = None
    # Tokens of a row; the end of a longer one is cut off.
    max_length: int | None = None
    # Training rows, as many of each train file.
    train_examples: int | None = None
    # Validation rows, as many of each train file.
    validation_examples: int | None = None
    # Rows of each test file.
    test_examples: int | None = None
    # Steps between two checkpoints.
    checkpoint_every: int = 50

    # Folder of the finished runs.
    run_folder: Path = Path("runs")
    # Print steps, parameters, memory and time, and train nothing.
    dry_run: bool = False

    # Devices, precision, and what is recorded of the speed.
    trainer: tyro.conf.OmitArgPrefixes[TrainerSettings] = dataclasses.field(
        default_factory=TrainerSettings
    )

    def __post_init__(self) -> None:
        adapting = [name for name, method in METHODS.items() if method.switches is not None]
        if unknown := set(self.methods) - set(adapting):
            raise SystemExit(f"unknown methods {sorted(unknown)}: choose from {adapting}")
        if not self.methods or self.rank < 1:
            raise SystemExit("give at least one method, and a rank of at least 1")
        if not self.rates or min(self.settled.seeds, self.settled.choosing_seeds) < 1:
            raise SystemExit("give at least one learning rate and one seed")
        if (self.settled.form, self.evaluation) == ("text", "generation"):
            raise SystemExit("--form text compares likelihoods: leave out --evaluation generation")
        if self.checkpoint is None and self.preset != "small" and not self.dry_run:
            raise SystemExit(f"--preset {self.preset} needs --checkpoint, the folder of the model")

    @property
    def settled(self) -> Preset:
        """The preset, with the options that were given in place of its own."""
        preset = PRESETS[self.preset]
        names = {field.name for field in dataclasses.fields(Preset)} - {"learning_rates"}
        given = {name: value for name, value in vars(self).items() if name in names}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if self.checkpoint is not None and self.preset == "small":
            changes["model"] = self.checkpoint.name
        return dataclasses.replace(preset, **changes)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that every method tries."""
        known = PRESETS[self.preset].learning_rates
        if self.learning_rates is None and self.rank not in known:
            raise SystemExit(f"give --learning-rates: the preset has them for ranks {[*known]}")
        return known[self.rank] if self.learning_rates is None else self.learning_rates

    @property
    def task(self) -> str:
        """The name of what is trained on."""
        return "+".join(self.settled.train) or "commonsense_170k"

    def recipe(self, rows: int) -> Recipe:
        """Returns how decoders are fine-tuned on so many rows."""
        preset = self.settled
        steps = max(1, round(preset.epochs * rows / preset.batch_size))
        warmup = preset.warmup if preset.warmup >= 1 else preset.warmup * steps
        return Recipe(
            rank=self.rank,
            alpha=2.0 * self.rank,
            dropout=preset.dropout,
            steps=steps,
            warmup=max(1, round(warmup)),
            batch_size=preset.batch_size,
            max_length=preset.max_length,
            train_on_prompt=preset.train_on_prompt,
            checkpoint_every=self.checkpoint_every,
        )

    def design(self, material: CommonsenseRows | None = None) -> Design:
        """Returns which runs there are; without rows, as many as the published file has."""
        preset = self.settled
        rows = PUBLISHED_ROWS if material is None else len(material.train)
        splits = {} if material is None else material.splits
        about = {
            "experiment": "commonsense",
            "task": self.task,
            "model": preset.model,
            "form": preset.form,
            "epochs": preset.epochs,
            "train_examples": rows,
        }
        if self.base != "float":
            about["base"] = self.base
        if preset.evaluation is not None:
            about["evaluation"] = preset.evaluation
        suffix = "" if self.base == "float" else f"_{self.base}"
        for split, tasks in splits.items():
            about[f"{split}_examples"] = {task: len(tasks[task]) for task in tasks}
        return Design(
            folder=self.run_folder / "commonsense" / f"{self.task}{suffix}",
            methods=self.methods,
            rates=self.rates,
            choosing_seeds=preset.choosing_seeds,
            seeds=preset.seeds,
            recipe=self.recipe(rows),
            about=about,
            trainer=self.trainer,
        )


def run(config: Config) -> None:
    """Trains and tests what has no result, and writes and prints `commonsense.md`."""
    config.trainer.set_up()
    folder = smollm2_folder() if config.checkpoint is None else config.checkpoint
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    material = load_material(config.data, config.settled, tokenizer)
    design = config.design(material)
    with alone_in(design.folder):
        switches = config.trainer.switches(load_llama)
        base = load_llama(folder, scan_layers=True, **switches)
        if config.base != "float":
            base = dora.quantize(base, config.base, target_modules="all-linear")

        def report() -> None:
            text = table(design.folder, TITLES)
            write_whole(design.folder / "commonsense.md", text + "\n")
            print(text, flush=True)

        Experiment(design, material, base).run(report)


def plan(config: Config) -> str:
    """Returns what a run would take. Without a checkpoint, from the paper's own figures."""
    if config.checkpoint is None and config.preset != "small":
        shape = MODELS[_SHAPES.get(config.preset, config.preset)]
        evaluated = {"validation": config.settled.validation_examples, "test": PUBLISHED_TEST_ROWS}
        return plan_text(config.design(), shape, None, evaluated, config.settled.max_length)
    folder = smollm2_folder() if config.checkpoint is None else config.checkpoint
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    material = load_material(config.data, config.settled, tokenizer)
    splits = material.splits
    evaluated = {split: sum(map(len, splits[split].values())) for split in splits}
    shape = LlamaConfig.from_json(folder / "config.json")
    # A question and all its options, or an instruction and its answer.
    tokens = 60 if config.settled.form == "text" else 200
    return plan_text(config.design(material), shape, material.train, evaluated, tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        if config.dry_run:
            print(plan(config))
        else:
            run(config)


if __name__ == "__main__":
    main()
