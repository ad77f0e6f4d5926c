"""Run folders as a sweep leaves them, written through the functions that sweeps use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.metrics import MetricsWriter
from experiments.trainer.run_folder import finish_run, start_run, write_whole

RATES = (1e-4, 1e-3, 1e-2)
# Validation by rate, and what a method adds to it: DoRA is best at the highest rate, an edge.
BY_RATE = {
    "full": {1e-4: 0.80, 1e-3: 0.70, 1e-2: 0.50},
    "lora": {1e-4: 0.70, 1e-3: 0.82, 1e-2: 0.60},
    "dora": {1e-4: 0.71, 1e-3: 0.83, 1e-2: 0.84},
    "base": {0.0: 0.5},
}
BEST = {"full": 1e-4, "lora": 1e-3, "dora": 1e-2}
EXAMPLES = 200
TASKS = {"cola": "matthews", "sst2": "accuracy"}


def noise(seed: int) -> float:
    return 0.01 * ((seed * 7) % 5 - 2)


def predictions(method: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels of a test split; a method is wrong in its own share of them."""
    labels = np.arange(EXAMPLES) % 2
    wrong = {"full": 20, "lora": 30, "dora": 24}[method] + seed
    flipped = np.random.default_rng(seed).permutation(EXAMPLES)[:wrong]
    found = labels.copy()
    found[flipped] = 1 - found[flipped]
    return found, labels


def write_run(root: Path, task: str, method: str, rate: float, seed: int, **settings: Any) -> Path:
    """Writes a finished run without test scores; returns its folder."""
    rank = 8 if method in ("lora", "dora") else 0
    more = "".join(f"_{name}-{value}" for name, value in settings.items())
    name = f"{method}_r{rank}_lr-{rate:g}_seed-{seed}{more}"
    folder = root / "glue" / task / name
    folder.mkdir(parents=True)
    config = {
        **{"experiment": "glue", "task": task, "model": "tiny", "method": method, "rank": rank},
        **{"alpha": 2.0 * rank, "learning_rate": rate, "magnitude_lr_ratio": 3.0, "seed": seed},
        **{"epochs": 1, "batch_size": 8, "max_length": 16, "train_examples": 64},
    }
    start_run(folder, config | settings)
    validation = {TASKS[task]: BY_RATE[method][rate] + noise(seed), "loss": 1.0}
    with MetricsWriter(folder) as writer:
        writer.write(8, "validation", validation)
    summary = {
        "validation": validation,
        "metric": TASKS[task],
        "trainable_parameters": {"full": 1000, "lora": 100, "dora": 110, "base": 0}[method],
        "seconds_per_step": {"full": 0.2, "lora": 0.1, "dora": 0.12}.get(method),
        "members": 4,
        "temporary_bytes": {"full": 300, "lora": 100, "dora": 105}.get(method),
        "forgetting": None if method == "full" else 0.01 * (seed + 1),
    }
    finish_run(folder, summary)
    return folder


def write_test(folder: Path, score: float, found: np.ndarray, labels: np.ndarray) -> None:
    """Adds test scores to a run."""
    task = json.loads((folder / "config.json").read_text())["task"]
    text = json.dumps({TASKS[task]: score, "examples": len(labels)})
    write_whole(folder / "test.json", text)
    np.savez(folder / "test_predictions.npz", predictions=found, labels=labels)


def score_of(task: str, method: str, seed: int) -> float:
    found, labels = predictions(method, seed)
    if task == "sst2":
        return float(np.mean(found == labels))
    return float(np.corrcoef(found, labels)[0, 1])


def write_sweep(root: Path, tasks: Sequence[str] = tuple(TASKS), seeds: int = 3) -> Path:
    """Writes a sweep: seed 0 at every rate, all seeds at the best one, which have test scores."""
    for task in tasks:
        for method, best in BEST.items():
            for rate in RATES:
                for seed in range(seeds if rate == best else 1):
                    folder = write_run(root, task, method, rate, seed)
                    if rate == best:
                        score = score_of(task, method, seed)
                        write_test(folder, score, *predictions(method, seed))
    return root
