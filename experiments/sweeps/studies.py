"""The studies of the ablation: what each varies, and what others found."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.sweeps.grid import Axes
from experiments.sweeps.members import Member
from experiments.trainer.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Study:
    """Settings that are compared.

    Attributes:
        title: Of its table.
        axes: Grids of values; the settings are those of all grids.
        published: What others report, by method and rank.
        source: Who, on which model and data.
    """

    title: str
    axes: tuple[Axes, ...]
    published: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    source: str = ""


_BOTH = ("lora", "dora")
_ATTENTION = ("query", "key", "value", "attention.output")

STUDIES = {
    "methods": Study(
        "Full fine-tuning, LoRA, DoRA, and the magnitude alone",
        ({"method": ("full", "lora", "dora", "magnitude")},),
    ),
    "components": Study(
        "Parts of DoRA",
        (
            {
                "method": (
                    "dora",
                    "dora-frozen-magnitude",
                    "dora-not-normalized",
                    "dora-detached",
                    "magnitude",
                    "lora",
                )
            },
        ),
        {
            ("dora", 8): 87.2,
            ("dora-frozen-magnitude", 8): 86.8,
            ("dora-not-normalized", 8): 86.5,
            ("lora", 8): 86.4,
        },
        "design document: RoBERTa-base, MNLI",
    ),
    "ranks": Study(
        "Ranks of LoRA and DoRA",
        ({"method": _BOTH, "rank": (1, 2, 4, 8, 16, 32, 64)},),
        {
            **dict(
                zip(
                    [("lora", rank) for rank in (4, 8, 16, 32, 64)],
                    (39.5, 40.7, 70.9, 74.7, 65.8),
                    strict=True,
                )
            ),
            **dict(
                zip(
                    [("dora", rank) for rank in (4, 8, 16, 32, 64)],
                    (61.9, 77.9, 77.5, 78.4, 72.1),
                    strict=True,
                )
            ),
        },
        "arXiv 2402.09353: LLaMA-7B, commonsense",
    ),
    "half-ranks": Study(
        "DoRA at half the rank of LoRA",
        ({"method": ("lora",), "rank": (8, 16, 32)}, {"method": ("dora",), "rank": (4, 8, 16)}),
    ),
    "magnitude": Study(
        "Learning rate and weight decay of the magnitude",
        ({"magnitude_lr_ratio": (0.3, 1.0, 3.0, 10.0), "magnitude_weight_decay": (0.0, 0.01)},),
    ),
    "eps": Study("Smallest norm", ({"eps": (1e-8, 1e-6, 1e-4, 1e-2)},)),
    "layers": Study(
        "Attention, MLP, or all linear layers",
        (
            {"method": _BOTH, "target_modules": (_ATTENTION,)},
            {
                "method": _BOTH,
                "target_modules": (("intermediate", "output"),),
                "exclude_modules": (("attention",),),
            },
            {"method": _BOTH},
        ),
    ),
    "batch": Study("Batch size", ({"method": _BOTH, "batch_size": (8, 32, 128)},)),
    "bases": Study(
        "Quantised kernels under LoRA and DoRA",
        ({"method": _BOTH, "base": ("float", "int8", "nf4")},),
    ),
    "initialisations": Study(
        "How the factors start",
        ({"init": ("kaiming_uniform", "gaussian", "orthogonal", "pissa", "olora")},),
    ),
}
"""The studies by name. Those of 12 rates and 5 seeds take hours on two CPU cores."""


def title_of(member: Member, study: Study) -> str:
    """Returns the name of a setting in the table of a study: the method, and what it varies.

    Example:
        >>> title_of(Member(method="lora", rank=4), STUDIES["ranks"])
        'LoRA, rank 4'
    """
    varied = {name for axes in study.axes for name in axes} - {"method"}
    known: dict[str, Any] = {**vars(member), **dict(member.switches)}
    named = [METHODS[member.method].title]
    for name in sorted(varied & known.keys()):
        value = known[name]
        text = ", ".join(value) if isinstance(value, tuple) else f"{value}"
        named.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(named)
