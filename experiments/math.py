r"""Compares LoRA and DoRA on mathematical word problems: MetaMathQA, tested on GSM8K and MATH.

The preset peft has the protocol of PEFT's comparison of methods: Llama-3.2-3B, 5,000 steps of four
rows, learning rate 1e-4, weight decay 0.1, adapters of rank 32 on queries and values, solutions of
at most 1,300 characters. The preset small fine-tunes SmolLM2-135M on the training rows of
LLM-Adapters whose solution comes to the published answer, and tests on MultiArith, SVAMP and GSM8K.
Answers are generated; the last number, or what stands after "The answer is", has to be the
published one exactly.

Give --data the folder of the published files: MetaMathQA-395K.json, gsm8k/test.jsonl and MATH/test;
for small, math_data.json and MultiArith/test.json, SVAMP/test.json, gsm8k/test.json.

Examples:
    python -m experiments.math --data dataset --dry-run
    python -m experiments.math --data dataset --steps 100 --test-examples 50
    python -m experiments.math --data dataset --preset peft --checkpoint Llama-3.2-3B \
        --dtype bfloat16
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from tokenizers import Tokenizer

from experiments.language.experiment import Design, Experiment
from experiments.language.plan import plan_text
from experiments.language.problems import PRESETS, TITLES, MathRows, Preset, load_rows
from experiments.language.runs import Recipe
from experiments.language.table import table
from experiments.models.huggingface import load_llama
from experiments.models.llama_config import LlamaConfig
from experiments.models.smollm import smollm2_folder
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.methods import METHODS
from experiments.trainer.run_folder import alone_in, write_whole
from experiments.trainer.settings import TrainerSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare methods on word problems. Options that are left out are the preset's."""

    # Folder of the published files.
    data: Path
    # What is trained and tested: small for two CPU cores, peft as in PEFT's comparison.
    preset: Literal["small", "peft"] = "small"
    # A LLaMA checkpoint folder in Hugging Face's format. The default of small is SmolLM2-135M.
    checkpoint: Path | None = None
    # Methods with adapters, such as lora, dora and dora-frozen-magnitude.
    methods: tuple[str, ...] = ("lora", "dora")
    # Rank of the adapters; alpha is twice the rank.
    rank: int | None = None

    # Peak learning rates that every method tries.
    learning_rates: tuple[float, ...] | None = None
    # Seeds of each rate, if there are several rates.
    choosing_seeds: int = 1
    # Seeds at the chosen rate, the choosing ones included.
    seeds: int = 1

    # Number of steps.
    steps: int | None = None
    # Rows of a step.
    batch_size: int | None = None
    # Tokens of a row; the end of a longer one is cut off.
    max_length: int | None = None
    # Most tokens of a generated solution.
    new_tokens: int | None = None
    # Training rows.
    train_examples: int | None = None
    # Validation rows, cut from the training file.
    validation_examples: int | None = None
    # Rows of each test file.
    test_examples: int | None = None

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
        preset = self.settled
        if not self.methods or not preset.learning_rates or min(self.seeds, preset.rank) < 1:
            raise SystemExit("give at least one method, learning rate and seed, and a rank")
        if self.checkpoint is None and self.preset != "small":
            raise SystemExit(f"--preset {self.preset} needs --checkpoint, the folder of the model")

    @property
    def settled(self) -> Preset:
        """The preset, with the options that were given in place of its own."""
        names = {field.name for field in dataclasses.fields(Preset)}
        given = {name: value for name, value in vars(self).items() if name in names}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if self.checkpoint is not None and self.preset == "small":
            changes["model"] = self.checkpoint.name
        return dataclasses.replace(PRESETS[self.preset], **changes)

    def design(self, rows: MathRows) -> Design:
        """Returns which runs there are."""
        preset = self.settled
        task = Path(preset.train).stem
        about: dict[str, Any] = {
            "experiment": "math",
            "task": task,
            "model": preset.model,
            "train_examples": len(rows.train),
            "new_tokens": preset.new_tokens,
        }
        for split, tasks in rows.splits.items():
            about[f"{split}_examples"] = {name: len(tasks[name]) for name in tasks}
        return Design(
            folder=self.run_folder / "math" / task,
            methods=self.methods,
            rates=preset.learning_rates,
            choosing_seeds=self.choosing_seeds,
            seeds=self.seeds,
            recipe=Recipe(
                rank=preset.rank,
                alpha=2.0 * preset.rank,
                target_modules=preset.target_modules,
                weight_decay=preset.weight_decay,
                steps=preset.steps,
                warmup=1,
                decay="cosine",
                batch_size=preset.batch_size,
                max_length=preset.max_length,
                train_on_prompt=preset.train_on_prompt,
            ),
            about=about,
            trainer=self.trainer,
        )


def run(config: Config) -> None:
    """Trains and tests what has no result, and writes and prints `math.md`."""
    config.trainer.set_up()
    folder = smollm2_folder() if config.checkpoint is None else config.checkpoint
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = load_rows(config.data, config.settled, tokenizer)
    design = config.design(rows)
    if config.dry_run:
        shape = LlamaConfig.from_json(folder / "config.json")
        evaluated = {split: sum(map(len, rows.splits[split].values())) for split in rows.splits}
        tokens = 100 + config.settled.new_tokens
        print(plan_text(design, shape, rows.train, evaluated, tokens))
        return
    with alone_in(design.folder):
        switches = config.trainer.switches(load_llama)
        base = load_llama(folder, scan_layers=True, **switches)

        def report() -> None:
            text = table(design.folder, TITLES)
            write_whole(design.folder / "math.md", text + "\n")
            print(text, flush=True)

        Experiment(design, rows, base).run(report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("The same command continues from here."):
        run(config)


if __name__ == "__main__":
    main()
