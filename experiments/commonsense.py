"""Compares LoRA and DoRA on the commonsense tasks of the DoRA paper, with a decoder.

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
    python -m experiments.commonsense --data dataset --preset llama-7b --rank 32 \
        --checkpoint llama-7b-hf --mesh fsdp=16 --dtype bfloat16 --remat save_scaled
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tokenizers import Tokenizer

from experiments.language.material import Material, load_material
from experiments.language.plan import plan_text
from experiments.language.presets import PRESETS, Preset
from experiments.language.runs import LanguageRun, Recipe
from experiments.language.table import table
from experiments.models.huggingface import load_llama
from experiments.models.llama import Llama
from experiments.models.smollm import smollm2_folder
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.methods import METHODS
from experiments.trainer.run_folder import (
    alone_in,
    finish_run,
    finished_run,
    start_run,
    write_whole,
)
from experiments.trainer.settings import TrainerSettings


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
    # Rank of the adapters; alpha is twice the rank.
    rank: int = 16

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
    def folder(self) -> Path:
        """The folder of the runs of this task."""
        return self.run_folder / "commonsense" / self.task

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


class Experiment:
    """The runs of a comparison, on loaded rows and a loaded decoder."""

    def __init__(self, config: Config, material: Material, base: Llama) -> None:
        self.config, self.material, self.base = config, material, base
        self.recipe = config.recipe(len(material.train))
        preset = config.settled
        self.about = {
            "experiment": "commonsense",
            "task": config.task,
            "model": preset.model,
            "form": preset.form,
            "epochs": preset.epochs,
            "train_examples": len(material.train),
            "validation_examples": {k: len(v) for k, v in material.splits["validation"].items()},
            "test_examples": {k: len(v) for k, v in material.splits["test"].items()},
        }

    def run(self) -> None:
        """Trains and tests what has no result yet, the base first."""
        config, preset = self.config, self.config.settled
        unrelated = self.evaluate_base()
        choosing = range(preset.choosing_seeds if len(config.rates) > 1 else 0)
        for seed in choosing:
            for rate in config.rates:
                for method in config.methods:
                    self.train(self.run_of(method, rate, seed), unrelated)
        for seed in range(preset.seeds):
            for method in config.methods:
                run = self.run_of(method, self.chosen(method), seed)
                self.train(run, unrelated)
                self.test(run)
            print(table(config.folder), flush=True)

    def run_of(self, method: str, rate: float, seed: int) -> LanguageRun:
        """Returns a run of the comparison."""
        name = f"{method}_r{self.recipe.rank}_lr-{rate:g}_seed-{seed}"
        return LanguageRun(
            folder=self.config.folder / name,
            method=method,
            learning_rate=rate,
            seed=seed,
            recipe=self.recipe,
            about=self.about,
            trainer=self.config.trainer,
        )

    def chosen(self, method: str) -> float:
        """Returns the rate with the best mean validation accuracy; of equal ones the lower loss."""
        rates, seeds = self.config.rates, range(self.config.settled.choosing_seeds)
        if len(rates) == 1:
            return rates[0]

        def quality(rate: float) -> tuple[float, float]:
            found = [self.run_of(method, rate, seed).summary() for seed in seeds]
            values = [one["validation"] for one in found if one is not None]
            loss = statistics.fmean(value.get("loss", 0.0) for value in values)
            return statistics.fmean(value["accuracy"] for value in values), -loss

        return max(rates, key=quality)

    def train(self, run: LanguageRun, unrelated: float | None) -> None:
        """Trains a run that has no summary."""
        if run.summary() is not None:
            return
        material = self.material

        def forgetting(model: Llama) -> dict[str, float]:
            loss = material.loss_on_unrelated(model)
            assert loss is not None and unrelated is not None
            return {"loss": loss - unrelated}

        summary = run.train(
            self.base,
            material.train,
            validate=material.validate,
            forgetting=None if unrelated is None else forgetting,
        )
        figures = ", ".join(
            f"{k} {v:.4f}" for k, v in summary["validation"].items() if "/" not in k
        )
        print(f"{run.title}: validation {figures}", flush=True)

    def evaluate_base(self) -> float | None:
        """Evaluates the decoder untrained; returns its loss on the unrelated texts."""
        folder = self.config.folder / "base_r0_lr-0_seed-0"
        own = {"method": "base", "rank": 0, "alpha": 0.0, "learning_rate": 0.0, "seed": 0}
        config = {**self.about, **own, "train_examples": 0, "epochs": 0, "steps": 0}
        config |= self.config.trainer.changes_results
        summary = finished_run(folder, config)
        if summary is None:
            folder.mkdir(parents=True, exist_ok=True)
            start_run(folder, config)
            summary = {
                "validation": self.material.validate(self.base),
                "metric": "accuracy",
                "trainable_parameters": 0,
                "seconds_per_step": None,
                "members": 1,
                "temporary_bytes": None,
                "forgetting": None,
                "unrelated_loss": self.material.loss_on_unrelated(self.base),
            }
            finish_run(folder, summary)
        if not (folder / "test.json").exists():
            self._write_test(folder, self.base)
        loss: float | None = summary["unrelated_loss"]
        return loss

    def test(self, run: LanguageRun) -> None:
        """Evaluates a finished run on the test rows, once."""
        if not (run.folder / "test.json").exists():
            self._write_test(run.folder, run.trained(self.base))

    def _write_test(self, folder: Path, model: Llama) -> None:
        result = self.material.evaluate(model, "test")
        arrays = {"predictions": result.predictions, "labels": result.labels, "task": result.task}
        np.savez(folder / "test_predictions.npz", **arrays)  # type: ignore[arg-type]
        figures = {**result.metrics, "examples": len(result.labels)}
        write_whole(folder / "test.json", json.dumps(figures, indent=2) + "\n")


def run(config: Config) -> str:
    """Trains the unfinished runs, writes `commonsense.md` and returns it."""
    config.trainer.set_up()
    folder = smollm2_folder() if config.checkpoint is None else config.checkpoint
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with alone_in(config.folder):
        material = load_material(config.data, config.settled, tokenizer)
        switches = config.trainer.switches(load_llama)
        base = load_llama(folder, scan_layers=True, **switches)
        Experiment(config, material, base).run()
        text = table(config.folder)
        write_whole(config.folder / "commonsense.md", text + "\n")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        print(plan_text(config) if config.dry_run else run(config))


if __name__ == "__main__":
    main()
