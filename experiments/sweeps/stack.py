"""The arrays of many members of a sweep, stacked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps.members import Member, MembersError, build
from experiments.sweeps.task import SweepTask

if TYPE_CHECKING:
    from jaxtyping import Array


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
