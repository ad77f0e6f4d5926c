"""Published figures that stand beside those of the runs, each with its source."""

from __future__ import annotations

from experiments.reporting.tables import Column, Table

PAPER = "DoRA, arXiv 2402.09353v6"
DESIGN = "this project's design document, which names no runs; not in the paper"

CORRELATIONS = {"full": -0.62, "lora": 0.83, "dora": -0.31}
"""corr(dD, dM) of q and v in VL-BART, over layers and four checkpoints (PAPER, section 3.2)."""


def _columns(first: str, *numbers: str) -> tuple[Column, ...]:
    return Column(first), *(Column(name, 1) for name in numbers)


_GLUE = Table(
    _columns("RoBERTa-base", "MNLI", "QQP", "QNLI", "SST-2", "average"),
    (
        ("full fine-tuning", 87.6, 91.9, 92.8, 94.8, 91.8),
        ("LoRA, r 8", 86.4, 91.3, 92.0, 93.7, 90.9),
        ("DoRA, r 8", 87.2, 91.7, 92.5, 94.3, 91.4),
    ),
    f"Source: {DESIGN}.",
)
_ABLATION = Table(
    _columns("RoBERTa-base", "MNLI"),
    (
        ("DoRA", 87.2),
        ("DoRA, magnitude frozen", 86.8),
        ("DoRA, not normalised", 86.5),
        ("LoRA", 86.4),
    ),
    f"Source: {DESIGN}.",
)
_EIGHT = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "average")
_COMMONSENSE = Table(
    _columns("model, method", *_EIGHT),
    (
        ("LLaMA-7B, LoRA, r 32", 68.9, 80.7, 77.4, 78.1, 78.8, 77.8, 61.3, 74.8, 74.7),
        ("LLaMA-7B, DoRA, r 16", 70.0, 82.6, 79.7, 83.2, 80.6, 80.6, 65.4, 77.6, 77.5),
        ("LLaMA-7B, DoRA, r 32", 69.7, 83.4, 78.6, 87.2, 81.0, 81.9, 66.2, 79.2, 78.4),
        ("LLaMA3-8B, LoRA", 70.8, 85.2, 79.9, 91.7, 84.3, 84.2, 71.2, 79.0, 80.8),
        ("LLaMA3-8B, DoRA", 74.6, 89.3, 79.9, 95.5, 85.6, 90.5, 80.4, 85.8, 85.2),
    ),
    f"Accuracy (%) after three epochs on commonsense_170k. Source: {PAPER}, table 1.",
)
_TABLES = {"glue": _GLUE, "ablation": _ABLATION, "commonsense": _COMMONSENSE}


def table(experiment: str) -> Table | None:
    """Returns the published figures of an experiment; None if there are none."""
    return _TABLES.get(experiment)
