"""One member of a sweep, and its model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from flax import nnx

import dora_jax as dora
from experiments.sweeps.task import SweepTask
from experiments.trainer.methods import METHODS, Base, Method
from experiments.trainer.step import CHANGING

if TYPE_CHECKING:
    Switches = tuple[tuple[str, Any], ...]


class MembersError(ValueError):
    """Members that cannot be trained, or not in one program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One training run of a sweep.

    Attributes:
        method: A name in `METHODS`.
        rank: Rank of the adapters. Methods without factors have 0, and an alpha of 0.
        alpha: The scaling is `alpha / rank`.
        learning_rate: The peak.
        seed: Of new parts of the model, the adapters, dropout and the order of the examples.
        magnitude_lr_ratio: Learning rate of the magnitude over `learning_rate`.
        magnitude_weight_decay: Decoupled decay of magnitudes.
        batch_size: Examples in a step.
        base: What the adapted kernels lie in: `"float"` as they are, or a format of
            `dora_jax.quantize`.
        switches: Further fields of `DoRAConfig`, as pairs.

    Example:
        >>> Member(method="dora", rank=4, alpha=8, learning_rate=1e-3, seed=1).name()
        'dora_r4_lr-0.001_seed-1'
    """

    method: str = "dora"
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-3
    seed: int = 0
    magnitude_lr_ratio: float = 3.0
    magnitude_weight_decay: float = 0.0
    batch_size: int = 32
    base: Base = "float"
    switches: Switches = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MembersError(f"unknown method {self.method!r}: choose from {list(METHODS)}")
        if self.base not in get_args(Base):
            raise MembersError(f"unknown base {self.base!r}: choose from {list(get_args(Base))}")
        fixed = METHODS[self.method].switches
        if fixed is None and self.base != "float":
            raise MembersError(f"{self.method} trains the kernels: they cannot be {self.base}")
        if fixed is None or fixed.get("rank") == 0:
            object.__setattr__(self, "rank", 0)
            object.__setattr__(self, "alpha", 0.0)
        elif self.rank < 1:
            raise MembersError(f"{self.method} needs a rank of at least 1, got {self.rank}")

    @property
    def kind(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    def name(self, usual: Member | None = None) -> str:
        """Returns the name of the run's folder.

        Args:
            usual: Other settings are named where they differ from those of this member.
        """
        usual = usual or Member()
        name = f"{self.method}_r{self.rank}_lr-{self.learning_rate:g}_seed-{self.seed}"
        other = ("magnitude_lr_ratio", "magnitude_weight_decay", "batch_size")
        for field in other:
            if (value := getattr(self, field)) != getattr(usual, field):
                name += f"_{field.replace('_', '-')}-{value:g}"
        if self.base != usual.base:
            name += f"_base-{self.base}"
        if self.rank and self.alpha / self.rank != usual.alpha / usual.rank:
            name += f"_alpha-{self.alpha:g}"
        for field, value in self.switches:
            text = "+".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
            name += f"_{field.replace('_', '-')}-{text}"
        return "".join(c if c.isalnum() or c in "._+-" else "+" for c in name)

    def settings(self) -> dict[str, Any]:
        """Returns the fields as `config.json` has them, `base` only where it is quantised."""
        fields = dataclasses.asdict(self)
        if self.base == "float":
            del fields["base"]
        return fields | dict(fields.pop("switches"))

    def config(self, task: SweepTask) -> dora.DoRAConfig | None:
        """Returns the configuration of the adapters, None where there are none."""
        if self.kind.switches is None:
            return None
        return self.kind.config(
            self.rank, self.alpha or 1.0, {**task.fields, **dict(self.switches)}
        )

    def family(self, task: SweepTask) -> Member:
        """Returns the same member for all that one program can train together.

        Rates, seeds, alphas and ratios are arrays of the program. Factors of a smaller rank are
        padded with zeros, which training keeps: ranks up to 8, 32, 128 and so on go together. Not
        where more than the start of the factors depends on the rank, nor where layers have ranks
        of their own.
        """
        same = dataclasses.replace(
            self, learning_rate=1.0, seed=0, magnitude_lr_ratio=1.0, magnitude_weight_decay=0.0
        )
        config = self.config(task)
        if config is None or not self.rank:
            return same
        if config.changes_product or config.rank_pattern or config.alpha_pattern:
            return same
        padded = 8
        while padded < self.rank:
            padded *= 4
        return dataclasses.replace(same, rank=padded, alpha=1.0)


class Parts(NamedTuple):
    """The arrays of one model, in trees of NNX.

    Attributes:
        graph: Everything that is no array.
        trained: What the method trains.
        changing: What a call changes, such as the keys of dropout.
        frozen: All others.
    """

    graph: Any
    trained: Any
    changing: Any
    frozen: Any


def build(task: SweepTask, member: Member) -> Parts:
    """Returns the model of a member at its start, in train mode."""
    model = task.model(member.seed)
    if member.base != "float" and (config := member.config(task)) is not None:
        model = dora.quantize(
            model,
            member.base,
            target_modules=config.target_modules,
            exclude_modules=config.modules_to_save,
        )
    model = member.kind.adapt(
        model,
        rank=member.rank,
        alpha=member.alpha or 1.0,
        seed=1000 + member.seed,
        call=task.example_call(),
        fields={**task.fields, **dict(member.switches)},
    )
    model.train()
    parts: Any = nnx.split(model, member.kind.trainable, CHANGING, ...)
    return Parts(*parts)
