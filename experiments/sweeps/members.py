"""One member of a sweep, and the arrays of many members stacked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dora_jax as dora
from experiments.sweeps.task import SweepTask
from experiments.trainer.methods import METHODS, Method
from experiments.trainer.step import CHANGING

if TYPE_CHECKING:
    from jaxtyping import Array

    Switches = tuple[tuple[str, Any], ...]


BASES = ("float", "nf4", "int4", "int8", "fp8")
"""What adapted kernels may lie in."""


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
    base: str = "float"
    switches: Switches = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MembersError(f"unknown method {self.method!r}: choose from {list(METHODS)}")
        if self.base not in BASES:
            raise MembersError(f"unknown base {self.base!r}: choose from {list(BASES)}")
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

    def targets(self, task: SweepTask) -> Any:
        """Returns which layers are adapted, as `target_modules` has them."""
        config = self.config(task)
        return None if config is None else config.target_modules

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
    if member.base != "float":
        model = dora.quantize(
            model,
            member.base,
            target_modules=member.targets(task),
            exclude_modules=task.fields.get("modules_to_save", ()),
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


class Stack:
    """What members of one family share, and how their arrays are stacked.

    Args:
        task: The task.
        members: All that the programs shall serve.

    Attributes:
        shape: A member of the largest rank.
        parts: Its model, with a scaling of 1 where alphas may differ.

    Raises:
        MembersError: The members are of several families.
    """

    def __init__(self, task: SweepTask, members: Sequence[Member]) -> None:
        families = {member.family(task) for member in members}
        if len(families) != 1:
            raise MembersError("members of one program share method, batch size and switches")
        shape = max(members, key=lambda member: member.rank)
        if families.pop().alpha == 1.0:
            shape = dataclasses.replace(shape, alpha=float(shape.rank))
        self.task, self.shape, self.parts = task, shape, build(task, shape)
        self._shapes = {shape.rank: [x.shape for x in jax.tree.leaves(self.parts.trained)]}

    def hyperparameters(self, members: Sequence[Member]) -> dict[str, np.ndarray]:
        """Returns what differs between members, as arrays `(member,)` of float32."""
        names = ("learning_rate", "magnitude_lr_ratio", "magnitude_weight_decay")
        found = {name: [getattr(member, name) for member in members] for name in names}
        found["scale"] = [self._scaling(m) / self._scaling(self.shape) for m in members]
        return {name: np.array(values, np.float32) for name, values in found.items()}

    def start(self, members: Sequence[Member]) -> tuple[list[Array], list[Array]]:
        """Returns the trained and the changing arrays of all members, `(member, ...)`.

        Raises:
            MembersError: Frozen arrays differ between seeds, so that they cannot be shared.
        """
        of_member = functools.cache(self._arrays)
        own = [of_member(member.seed, member.rank) for member in members]
        trained, changing = ([arrays[i] for arrays in own] for i in (0, 1))
        return self.stack(trained), [_stacked(x) for x in zip(*changing, strict=True)]

    def stack(self, trained: Sequence[Sequence[Any]]) -> list[Array]:
        """Stacks the trained arrays of members; those of a smaller rank are padded with zeros."""
        shapes = self._shapes[self.shape.rank]
        arrays = zip(*trained, strict=True)
        return [
            _stacked([_padded(x, shape) for x in own])
            for own, shape in zip(arrays, shapes, strict=True)
        ]

    def arrays_of(self, member: Member, stack: Sequence[Array], index: int) -> list[np.ndarray]:
        """Returns the trained arrays of one member out of a stack, without padding."""
        if member.rank not in self._shapes:
            self._arrays(member.seed, member.rank)
        shapes = self._shapes[member.rank]
        return [
            np.asarray(x[index])[tuple(map(slice, shape))]
            for x, shape in zip(stack, shapes, strict=True)
        ]

    def names(self) -> list[str]:
        """Returns the path of each trained array."""
        paths = (path for path, _ in jax.tree.leaves_with_path(self.parts.trained))
        return [jax.tree_util.keystr(p, simple=True, separator=".") for p in paths]

    def _arrays(self, seed: int, rank: int) -> tuple[list[Array], list[Array]]:
        parts = build(self.task, dataclasses.replace(self.shape, seed=seed, rank=rank))
        for x, y in zip(*map(jax.tree.leaves, (parts.frozen, self.parts.frozen)), strict=True):
            if not np.array_equal(np.asarray(x), np.asarray(y)):
                raise MembersError(
                    f"{self.task.name}: frozen arrays of seeds {self.shape.seed} and {seed} "
                    "differ. Name the parts that are drawn with the seed in modules_to_save"
                )
        trained = jax.tree.leaves(parts.trained)
        self._shapes[rank] = [x.shape for x in trained]
        return trained, jax.tree.leaves(parts.changing)

    def _scaling(self, member: Member) -> float:
        config = member.config(self.task)
        return 1.0 if config is None or not member.rank else config.layer_settings(()).scaling


def scale_lora_b(tree: Any, scale: Any) -> Any:
    """Returns a tree of adapters with each `lora_b` multiplied.

    Example:
        >>> scale_lora_b({"query": {"lora_a": 3.0, "lora_b": 3.0}}, 2.0)
        {'query': {'lora_a': 3.0, 'lora_b': 6.0}}
    """

    def one(path: Any, x: Any) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return x * scale if "lora_b" in names else x

    return jax.tree.map_with_path(one, tree)


def stack_batches(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks the batches of members, `(member, example, ...)`; shorter ones padded with zeros.

    Example:
        >>> short, long = ({"input_ids": np.ones((1, n), int)} for n in (1, 3))
        >>> stack_batches([short, long])["input_ids"].tolist()
        [[[1, 0, 0]], [[1, 1, 1]]]
    """
    found = {}
    for name in batches[0]:
        own = [batch[name] for batch in batches]
        shape = tuple(map(max, zip(*(x.shape for x in own), strict=True)))
        found[name] = np.stack([_padded(x, shape) for x in own])
    return found


def _padded(x: Any, shape: tuple[int, ...]) -> Any:
    if x.shape == shape:
        return x
    missing = [(0, size - own) for own, size in zip(x.shape, shape, strict=True)]
    return np.pad(np.asarray(x), missing)


def _stacked(arrays: Sequence[Any]) -> Array:
    """Stacks on the host: on a device each shape would be a program of its own."""
    if jnp.issubdtype(arrays[0].dtype, jax.dtypes.prng_key):
        data = np.stack([np.asarray(jax.random.key_data(key)) for key in arrays])
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(arrays[0]))
    return jnp.asarray(np.stack([np.asarray(x) for x in arrays]))
