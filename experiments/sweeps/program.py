"""The compiled programs of a sweep: a training step and predictions of many members at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.sweeps.members import Member
from experiments.sweeps.stack import Stack, scale_lora_b, stack_batches
from experiments.sweeps.task import Batch
from experiments.trainer.step import Gradient, squares_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Arrays = list[Array]


class State(NamedTuple):
    """The arrays of members that a step replaces, each `(member, ...)`.

    Attributes:
        trained: Adapters and what else is trained.
        changing: What a call of the model changes, such as the keys of dropout.
        optimizer: The state of the optimiser.
    """

    trained: Arrays
    changing: Arrays
    optimizer: Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of each step, over its peak.

    Attributes:
        steps: Number of all steps.
        warmup: Share of the steps in which it rises from 0; a number from 1 on is of steps.
        decay: How it falls to 0 afterwards.
    """

    steps: int
    warmup: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"

    def over_peak(self) -> optax.Schedule:
        """Returns the schedule with a peak of 1."""
        rising = self.warmup if self.warmup >= 1 else self.warmup * self.steps
        warmup = max(1, round(rising))
        if self.decay == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps)
        parts = [
            optax.linear_schedule(0.0, 1.0, warmup),
            optax.linear_schedule(1.0, 0.0, max(1, self.steps - warmup)),
        ]
        return optax.join_schedules(parts, [warmup])


class Outcomes(NamedTuple):
    """What a step reports of each member, as arrays that may still be computed.

    Attributes:
        loss: The mean loss of its batch.
        square: The squared norm of its gradient.
    """

    loss: Float[Array, " member"]
    square: Float[Array, " member"]


class Programs:
    """The programs of a family of members; one compilation for each shape of what they are given.

    The frozen arrays are held once. Where there are several devices and their number divides that
    of the members, each device has an equal share of the members.

    Args:
        stack: What the members share.
        schedule: Of the learning rate.
        microbatches: Parts of each member's batch that are computed one after the other.

    Attributes:
        temporary_bytes: Memory of the step beside its arguments, by number of members.
    """

    def __init__(self, stack: Stack, schedule: Schedule, *, microbatches: int = 1) -> None:
        self.stack, self._over_peak = stack, schedule.over_peak()
        parts, kind = stack.parts, stack.shape.kind
        self._gradient = Gradient(parts.graph, kind.trainable, stack.task.loss, microbatches)
        self._trees = [jax.tree.structure(tree) for tree in parts[1:]]
        self._frozen = jax.tree.leaves(parts.frozen)
        self._optimizer_tree: Any = None
        self._compiled: dict[Any, Any] = {}
        self.temporary_bytes: dict[int, int] = {}

    def start(self, members: Sequence[Member]) -> State:
        """Returns the state of members before their first step."""
        arrays = (*self.stack.start(members), self._hyperparameters(members))
        trained, changing, own = self._placed(arrays, len(members))
        return State(trained, changing, self._run("init", self._init, trained, own))

    def step(
        self, state: State, members: Sequence[Member], batches: Sequence[Batch]
    ) -> tuple[State, Outcomes]:
        """Takes a step of every member, each on its own batch. Returns before it is done.

        The arrays of `state` cannot be used afterwards.
        """
        count = len(members)
        given = self._placed((self._hyperparameters(members), stack_batches(batches)), count)
        state, outcomes = self._run("step", self.steps, state, *given, self._shared(count))
        return State(*state), outcomes

    def abstract(self, members: Sequence[Member], batches: Sequence[Batch]) -> tuple[Any, ...]:
        """Returns the arguments of `steps` as shapes: for compiling it elsewhere."""
        parts, count = self.stack.parts, len(members)

        def like(tree: Any) -> list[Any]:
            shapes = ((count, *x.shape) for x in jax.tree.leaves(tree))
            types = (x.dtype for x in jax.tree.leaves(tree))
            return [jax.ShapeDtypeStruct(*own) for own in zip(shapes, types, strict=True)]

        own = self._hyperparameters(members)
        trained = like(parts.trained)
        state = State(trained, like(parts.changing), jax.eval_shape(self._init, trained, own))
        given = jax.eval_shape(lambda *x: x, own, stack_batches(batches), self._frozen)
        return state, *given

    def predict(
        self, state: State, members: Sequence[Member], batches: Sequence[Batch]
    ) -> Float[np.ndarray, "member row ..."]:
        """Returns the outputs of every member on the same batches, one after the other."""
        count = len(members)
        scale = self._placed(self._hyperparameters(members)["scale"], count)
        arrays = (state.trained, state.changing, scale, self._shared(count))
        found = [self._run("predict", self._predictions, *arrays, dict(b)) for b in batches]
        return np.concatenate([np.asarray(x) for x in found], axis=1)

    # What is compiled.

    def _optimizer(self, own: Any) -> optax.GradientTransformation:
        """Returns the optimiser of a member from its hyperparameters, which may be traced."""
        return self.stack.shape.kind.optimizer(
            lambda step: own["learning_rate"] * self._over_peak(step),
            lambda step: own["magnitude_lr_ratio"],
            own["magnitude_weight_decay"],
        )

    def _init(self, trained: Arrays, hyperparameters: Any) -> Any:
        def one(trained: Arrays, own: Any) -> Any:
            start = self._optimizer(own).init(jax.tree.unflatten(self._trees[0], trained))
            leaves, self._optimizer_tree = jax.tree.flatten(start)
            return leaves

        return jax.vmap(one)(trained, hyperparameters)

    def steps(self, state: State, hyperparameters: Any, batches: Any, frozen: Arrays) -> Any:
        """Returns the state and the outcomes of all members after a step: what is compiled."""

        def one(state: State, own: Any, batch: Any) -> Any:
            trained, changing, rest = self._unflattened(state.trained, state.changing, frozen)
            optimizer = jax.tree.unflatten(self._optimizer_tree, state.optimizer)
            scaled = scale_lora_b(trained, own["scale"])
            (loss, _, changing), grads = self._gradient(scaled, changing, rest, batch)
            grads = scale_lora_b(grads, own["scale"])
            updates, optimizer = self._optimizer(own).update(grads, optimizer, trained)
            after = (optax.apply_updates(trained, updates), changing, optimizer)
            outcomes = Outcomes(loss, jnp.sum(squares_of(grads)))
            return State(*map(jax.tree.leaves, after)), outcomes

        return jax.vmap(one)(state, hyperparameters, batches)

    def _predictions(
        self, trained: Arrays, changing: Arrays, scale: Array, frozen: Arrays, batch: Any
    ) -> Array:
        def one(trained: Arrays, changing: Arrays, scale: Array) -> Array:
            trees = self._unflattened(trained, changing, frozen)
            scaled = scale_lora_b(trees[0], scale)
            model = nnx.merge(self.stack.parts.graph, scaled, *trees[1:], copy=True)
            model.eval()
            return self.stack.task.predict(model, batch)

        return jax.vmap(one)(trained, changing, scale)

    def _unflattened(self, *leaves: Arrays) -> list[Any]:
        return [jax.tree.unflatten(tree, x) for tree, x in zip(self._trees, leaves, strict=True)]

    def _run(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function, compiled for these shapes before or now."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (name, structure, *((x.shape, x.dtype) for x in leaves))
        if (compiled := self._compiled.get(key)) is None:
            donated = (0,) if name == "step" else ()
            jitted = jax.jit(
                function, donate_argnums=donated, out_shardings=self._sharding(len(leaves[0]))
            )
            compiled = jitted.lower(*arguments).compile()
            self._compiled[key] = compiled
            if name == "step":
                members = leaves[0].shape[0]
                memory = compiled.memory_analysis()
                own = getattr(memory, "temp_size_in_bytes", 0)
                self.temporary_bytes[members] = max(self.temporary_bytes.get(members, 0), own)
        return compiled(*arguments)

    @property
    def compilations(self) -> int:
        """Number of programs that were compiled."""
        return len(self._compiled)

    # Where the arrays lie.

    def _hyperparameters(self, members: Sequence[Member]) -> dict[str, np.ndarray]:
        return self.stack.hyperparameters(members)

    def _sharding(self, members: int, axis: str | None = "member") -> NamedSharding | None:
        """Returns where arrays of some members lie; None for one device."""
        devices = jax.devices()
        if len(devices) == 1 or members % len(devices):
            return None
        return NamedSharding(Mesh(np.array(devices), ("member",)), PartitionSpec(axis))

    def _placed(self, arrays: Any, members: int) -> Any:
        sharding = self._sharding(members)
        return arrays if sharding is None else jax.device_put(arrays, sharding)

    def _shared(self, members: int) -> Arrays:
        sharding = self._sharding(members, None)
        if sharding is not None:
            self._frozen = jax.device_put(self._frozen, sharding)
        return self._frozen
