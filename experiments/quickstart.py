"""Fine-tunes a pretrained MiniLM with DoRA to tell sarcastic headlines from serious ones.

Downloads the weights and the headlines (120 MB, once), trains every linear layer of the encoder and
a new head, and writes the adapter, the metrics and the plots to a run folder. It takes a few
minutes on two CPU cores.

Examples:
    python -m experiments.quickstart
    python -m experiments.quickstart --rank 4 --epochs 1 --run-folder runs/rank-4
    python -m experiments.quickstart --mesh fsdp=8 --dtype bfloat16
    python -m experiments.quickstart --mesh data=16     # the same on every host: docs/many_hosts.md
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from jax.experimental import multihost_utils

import dora_jax as dora
from experiments.models.huggingface import save_bert
from experiments.tasks.metrics import MetricsWriter, interval_95, read_metrics
from experiments.tasks.probe import probe_accuracy
from experiments.tasks.task import Examples, Task, load_task
from experiments.trainer import distributed
from experiments.trainer.classification import (
    Schedule,
    classifier_training,
    count,
    evaluate,
    example_call,
    logits_of,
)
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.loop import fit
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.placement import on_this_process
from experiments.trainer.plots import layer_changes, plot_curves, plot_layer_changes
from experiments.trainer.run_folder import alone_in, finish_run, start_run
from experiments.trainer.settings import TrainerSettings


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a pretrained encoder with DoRA."""

    # Folder of the results. If it holds an unfinished run of the same settings, that is resumed.
    run_folder: Path | None = None
    # A BERT or RoBERTa checkpoint folder in Hugging Face's format. The default is MiniLM.
    checkpoint: Path | None = None

    # Rank of the adapters.
    rank: int = 8
    # The scaling of the adapters is alpha / rank.
    alpha: float = 16.0
    # Dropout rate on the input of the low-rank branch.
    dropout: float = 0.0

    # The peak of the learning rate.
    learning_rate: float = 1e-3
    # Learning rate of the magnitude over `learning_rate`.
    magnitude_lr_ratio: float = 3.0

    # Passes over the training texts.
    epochs: int = 2
    # Texts in a step.
    batch_size: int = 32
    # Steps between two checkpoints.
    checkpoint_every: int = 50
    # Seed of the new head, the adapters and the order of the texts.
    seed: int = 0

    # Number of training texts, up to 4,000.
    train_examples: int = 4000
    # Tokens per text. 2 % of the headlines are longer than 24, and their end is cut off.
    max_length: int = 24

    # Devices, precision, and what is recorded of the speed.
    trainer: tyro.conf.OmitArgPrefixes[TrainerSettings] = dataclasses.field(
        default_factory=TrainerSettings
    )


def run(config: Config) -> dict[str, Any]:
    """Runs the experiment, and returns the contents of `summary.json`."""
    folder = config.run_folder or _new_run_folder()
    _say(f"Run folder: {folder}")
    config.trainer.set_up()
    with alone_in(folder):
        return _run(config, folder)


def _run(config: Config, folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    _check_settings(config, folder)
    task = _load(config)
    base = task.model(config.seed, **config.trainer.switches(task.model))
    _say("Fitting a logistic regression on the frozen encoder, for comparison")
    probe = probe_accuracy(base, task)

    dora_config = dora.DoRAConfig(
        rank=config.rank, alpha=config.alpha, dropout=config.dropout, modules_to_save=["classifier"]
    )
    rngs, call = nnx.Rngs(config.seed + 1), example_call(task.train)
    model = dora.apply_dora(base, dora_config, rngs=rngs, inputs=call)
    step_0 = _max_difference(model, base, task.validation)
    training = _train(config, dora_config, model, task, folder)

    merged = dora.merge(model)
    merged_here = on_this_process(merged)
    head = merged_here.classifier
    save_bert(merged.encoder, folder / "merged", source=task.checkpoint, head=head)
    if _leads():
        plot_curves(read_metrics(folder), folder / "curves.png")
        plot_layer_changes(layer_changes(base, merged_here), folder / "layers.png")
    trained = dora.adapters.count_parameters(dora.get_adapters(model))
    summary = {
        "majority_accuracy": task.majority,
        "frozen_probe_accuracy": probe,
        **training,
        "test_accuracy_95": interval_95(training["test_accuracy"], len(task.test)),
        "trainable_parameters": trained,
        "trainable_share": trained["total"] / count(base, nnx.Param),
        "adapter_bytes": _save_adapter(model, dora_config, folder / "adapter"),
        "step_0_max_difference": step_0,
        "merge_max_difference": _max_difference(merged, model, task.validation),
        "total_seconds": time.monotonic() - start,
        "peak_memory_bytes": _peak_memory_bytes(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    finish_run(folder, summary)
    _report(summary, folder)
    return summary


def _new_run_folder() -> Path:
    """Returns a folder named by the time; all processes return that of the first one."""
    now = int(multihost_utils.broadcast_one_to_all(np.int32(time.time())))
    return Path("runs") / "quickstart" / datetime.fromtimestamp(now).strftime("%Y-%m-%d_%H-%M-%S")


def _check_settings(config: Config, folder: Path) -> None:
    """Writes the settings into the run folder, or checks that they are the same."""
    if (folder / "summary.json").exists():
        raise SystemExit(f"{folder} holds a finished run: choose another --run-folder")
    fields = dataclasses.asdict(config) | {"checkpoint": str(config.checkpoint or "MiniLM")}
    del fields["run_folder"], fields["trainer"]
    start_run(folder, fields | config.trainer.changes_results)


def _load(config: Config) -> Task:
    task = load_task(
        max_length=config.max_length, train=config.train_examples, checkpoint=config.checkpoint
    )
    truncated = sum(e.tokens.truncated for e in (task.train, task.validation, task.test))
    _say(
        f"{len(task.train)} training, {len(task.validation)} validation, {len(task.test)} test "
        f"headlines; {truncated} cut to {config.max_length} tokens"
    )
    return task


def _train(
    config: Config, dora_config: dora.DoRAConfig, model: nnx.Module, task: Task, folder: Path
) -> dict[str, Any]:
    """Trains in place. Then evaluates on the test texts, once."""
    start = time.monotonic()
    schedule = Schedule(
        config.learning_rate,
        config.epochs,
        config.batch_size,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
    )
    tx = dora.dora_optimizer(
        schedule.learning_rates(task.train), magnitude_lr_ratio=config.magnitude_lr_ratio
    )
    optimizer = nnx.Optimizer(model, tx, wrt=dora.DoRAParam)
    training = classifier_training(
        model, optimizer, task, schedule, config.trainer, config=dora_config
    )
    fitted = fit(training, folder, config.trainer)
    training_seconds = time.monotonic() - start
    test = evaluate(model, task.test)
    if _leads():
        with MetricsWriter(folder, resume_step=training.steps + 1) as writer:
            if "test" not in {line["split"] for line in read_metrics(folder)}:  # killed after that
                writer.write(training.steps, "test", test)
    return {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "resumed_from_step": fitted.resumed_from_step,
        "seconds_per_step": fitted.seconds_per_step,
        "training_seconds": training_seconds,
    }


def _save_adapter(model: nnx.Module, config: dora.DoRAConfig, folder: Path) -> int:
    """Saves the adapter, replacing an older one. Returns its size on disk in bytes."""
    dora.save(folder, model, config, overwrite=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _max_difference(one: nnx.Module, other: nnx.Module, examples: Examples) -> float:
    """Returns the largest absolute difference of two models' logits."""
    return float(np.max(np.abs(logits_of(one, examples) - logits_of(other, examples))))


def _peak_memory_bytes() -> int:
    """Returns the peak resident memory of the process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _report(summary: dict[str, Any], folder: Path) -> None:
    low, high = summary["test_accuracy_95"]
    rows = {
        "always the most frequent class": f"{summary['majority_accuracy']:.3f}",
        "logistic regression, frozen encoder": f"{summary['frozen_probe_accuracy']:.3f}",
        "DoRA": f"{summary['test_accuracy']:.3f}   (95 %: {low:.3f} to {high:.3f})",
        "trainable parameters": f"{summary['trainable_parameters']['total']:,} "
        f"({summary['trainable_share']:.2%} of the model)",
        "adapter on disk": f"{summary['adapter_bytes'] / 1e6:.2f} MB",
        "adapted - pretrained logits at step 0": f"{summary['step_0_max_difference']} (max abs)",
        "merged - adapted logits": f"{summary['merge_max_difference']:.2g} (max abs)",
        "training": f"{summary['training_seconds']:.0f} s"
        + (f", {seconds:.3f} s/step" if (seconds := summary["seconds_per_step"]) else ""),
        "peak memory": f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
    }
    _say("\nTest accuracy")
    for i, (name, value) in enumerate(rows.items()):
        if i == 3:
            _say("")
        _say(f"  {name:<40} {value}")
    _say(f"\nIn {folder}")
    for name, what in {
        "adapter/": "the adapter (Orbax) with its configuration: dora.load",
        "best/": "the adapter with the lowest validation loss, likewise",
        "merged/": "the merged model, a Hugging Face folder",
        "curves.png": "loss and accuracy",
        "layers.png": "magnitude and direction change of each layer",
        "metrics.jsonl": "metrics by step; the same for TensorBoard in events.*",
        "summary.json": "the figures above; how they were made is in config.json and run.json",
    }.items():
        _say(f"  {name:<16} {what}")
    _say(
        "\nNext: python -m experiments.quickstart --rank 4\n"
        "      python -m experiments.ablation --studies methods\n"
        "      notebooks/01_first_steps.ipynb"
    )


def _leads() -> bool:
    """Whether this process is the one that prints and draws for all."""
    return jax.process_index() == 0


def _say(text: str) -> None:
    if _leads():
        print(text, flush=True)


def main() -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__)
    with distributed.start("The same command, with --run-folder, goes on from here."):
        folder = config.run_folder or _new_run_folder()
        with in_one_line(f"To go on, give the same options with --run-folder {folder}"):
            run(dataclasses.replace(config, run_folder=folder))


if __name__ == "__main__":
    main()
