"""One training step as a compiled function of arrays, with gradients summed over microbatches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

import dora_jax as dora
from experiments.trainer.settings import SettingsError

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Loss: TypeAlias = Callable[[Any, Any], "tuple[Float[Array, ''], Mapping[str, Float[Array, '']]]"]
"""`loss(model, batch) -> (loss, metrics)`: means over the batch. See `WEIGHT`."""

WEIGHT = "weight"
"""The metric that says how much a batch counts, such as its number of tokens; by default 1.

Losses and metrics of microbatches are averaged by it, so that they are those of the whole batch.
"""

# What a call of a model changes.
CHANGING = nnx.Any(nnx.RngState, nnx.BatchStat, nnx.Cache)


class Outcome(NamedTuple):
    """What a step reports, as arrays that may still be computed.

    Attributes:
        loss: The mean loss of the batch, before the update.
        metrics: Those of the loss function, without `WEIGHT`.
        squares: The squared norm of each trained variable's gradient, `(variable,)`. Clipping needs
            those norms anyway.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    squares: Float[Array, " variable"]


class TrainStep:
    """Takes training steps of a model. Its arrays are held here between steps.

    A step donates the arrays that it replaces, so that the model and the optimiser hold none that
    can be used until `write_back`. Programs are shared by all models of equal structure that have
    the same optax transformation and the same loss.

    Args:
        model: The model, in the mode (train or eval) that the steps shall have.
        optimizer: An optimiser of the model; `optimizer.wrt` selects what is trained.
        loss: The loss function.
        microbatches: Number of equal parts of a batch that are taken one after the other. Scales of
            adapters are computed, and differentiated, once for all of them.

    Example:
        >>> import optax
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> def loss(model, batch):
        ...     return jnp.mean((model(batch["x"]) - 1) ** 2), {}
        >>> step = TrainStep(model, optimizer, loss, microbatches=2)
        >>> first, *_, last = (float(step({"x": jnp.ones((4, 2))}).loss) for _ in range(20))
        >>> step.write_back()
        >>> bool(last < 1e-3 * first), optimizer.step[...]
        (True, Array(20, dtype=uint32))
    """

    def __init__(
        self, model: nnx.Module, optimizer: nnx.Optimizer, loss: Loss, *, microbatches: int = 1
    ) -> None:
        self.model, self.optimizer = model, optimizer
        parts: Any = nnx.split(model, optimizer.wrt, CHANGING, ...)
        graphdef, trained, changing, frozen = parts
        of_optimizer, state = nnx.split(optimizer)
        # Lists of arrays: JAX flattens the states of NNX in Python, anew in every step.
        self._state, structure = jax.tree.flatten((trained, changing, state))
        self._frozen, frozen_structure = jax.tree.flatten(frozen)
        gradient = Gradient(graphdef, optimizer.wrt, loss, microbatches)
        program = _Program(gradient, of_optimizer, structure, frozen_structure)
        self._structure = structure
        self._run = _compiled(program, tuple(map(_named_sharding, self._state)))

    def __call__(self, batch: Any) -> Outcome:
        """Takes a step on a batch, whose arrays have a leading axis. Returns before it is done.

        Raises:
            SettingsError: The microbatches do not divide the batch.
        """
        self._state, outcome = self._run(self._state, self._frozen, batch)
        return outcome

    def lower(self, batch: Any) -> jax.stages.Lowered:
        """Returns the step on such a batch, lowered and not run: `.compile()` says its memory."""
        return self._run.lower(self._state, self._frozen, batch)

    def write_back(self) -> None:
        """Puts the arrays of the newest step into the model and the optimiser."""
        trained, changing, state = jax.tree.unflatten(self._structure, self._state)
        nnx.update(self.model, trained, changing)
        nnx.update(self.optimizer, state)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient of a loss, as a function of a model's arrays.

    Attributes:
        model: The model's graph, from `nnx.split`.
        wrt: Selects what is trained.
        loss: The loss function.
        microbatches: As for `TrainStep`.
    """

    model: Any
    wrt: Any
    loss: Loss
    microbatches: int = 1

    def __call__(self, trained: Any, changing: Any, frozen: Any, batch: Any) -> Any:
        """Returns `((loss, metrics, changing), gradient)`; the metrics have `WEIGHT`.

        Args:
            trained: The variables that are trained.
            changing: Those of `CHANGING`, which a call of the model changes.
            frozen: All other variables.
            batch: Arrays with a leading axis.
        """
        gradient = self._of_all if self.microbatches == 1 else self._mean
        return gradient(trained, changing, frozen, batch)

    def _of_all(self, trained: Any, changing: Any, frozen: Any, batch: Any) -> Any:
        """Returns the gradient of the whole batch."""

        def loss_of(trained: Any) -> Any:
            model = nnx.merge(self.model, trained, changing, frozen, copy=True)
            loss, metrics = self.loss(model, batch)
            given: dict[str, Any] = {WEIGHT: 1.0, **metrics}
            numbers = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
            return loss.astype(jnp.float32), (numbers, nnx.state(model, CHANGING))

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (metrics, changing)), grads = value_and_grad(trained)
        return (loss, metrics, changing), grads

    def _mean(self, trained: Any, changing: Any, frozen: Any, batch: Any) -> Any:
        """Returns the same with the batch cut into microbatches.

        The gradient is that of the precomputed scales until it has been summed: norms are
        differentiated once, and only one microbatch's activations are in memory.
        """
        parts = jax.tree.map(functools.partial(_cut, self.microbatches), batch)
        gradient, pull_back = self, None
        if isinstance(self.wrt, type) and issubclass(self.wrt, dora.DoRAParam):
            static: dict[str, Any] = {}

            def precompute(trained: Any) -> Any:
                model = nnx.merge(self.model, trained, changing, frozen, copy=True)
                split: Any = nnx.split(dora.precompute_scales(model), self.wrt, CHANGING, ...)
                static["graphdef"], scaled, own_changing, rest = split
                return scaled, (own_changing, rest)

            trained, pull_back, (changing, frozen) = jax.vjp(precompute, trained, has_aux=True)
            gradient = dataclasses.replace(self, model=static["graphdef"])

        def add(carry: Any, part: Any) -> Any:
            changing, total = carry
            (loss, metrics, changing), grads = gradient._of_all(trained, changing, frozen, part)
            weight = metrics[WEIGHT]
            total = jax.tree.map(lambda s, g: s + (weight * g).astype(s.dtype), total, grads)
            return (changing, total), (loss, metrics)

        zeros = jax.tree.map(jnp.zeros_like, trained)
        (changing, total), (losses, metrics) = jax.lax.scan(add, (changing, zeros), parts)
        weights = metrics[WEIGHT]
        count = jnp.sum(weights)
        loss, metrics = jax.tree.map(lambda x: jnp.sum(weights * x) / count, (losses, metrics))
        grads = jax.tree.map(lambda x: (x / count).astype(x.dtype), total)
        return (loss, metrics, changing), grads if pull_back is None else pull_back(grads)[0]


@dataclasses.dataclass(frozen=True)
class _Program:
    """Everything that a step's program depends on except its arrays."""

    gradient: Gradient
    optimizer: Any
    structure: Any
    frozen_structure: Any

    def step(self, state: list[Array], frozen: list[Array], batch: Any) -> Any:
        """Returns the arrays after a step, and its `Outcome`."""
        trained, changing, optimizer_state = jax.tree.unflatten(self.structure, state)
        rest = jax.tree.unflatten(self.frozen_structure, frozen)
        (loss, metrics, changing), grads = self.gradient(trained, changing, rest, batch)
        model = nnx.merge(self.gradient.model, trained, changing, rest, copy=True)
        optimizer = nnx.merge(self.optimizer, optimizer_state, copy=True)
        optimizer.update(model, grads)
        after = nnx.state(model, self.gradient.wrt), changing, nnx.state(optimizer)
        del metrics[WEIGHT]
        return jax.tree.leaves(after), Outcome(loss, metrics, squares_of(grads))


@functools.lru_cache(maxsize=8)
def _compiled(program: _Program, shardings: tuple[Any, ...]) -> Any:
    """Returns the compiled step: one for all runs of equal structure."""
    # What comes out lies where it lay before; left alone, XLA may cut it in another way.
    placed: dict[str, Any] = {"out_shardings": (list(shardings), None)} if any(shardings) else {}
    return jax.jit(program.step, donate_argnums=0, **placed)


def _named_sharding(x: Any) -> Any:
    """Returns where an array of several devices lies, and None for those of one."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _cut(parts: int, x: Array) -> Array:
    """Returns an array with a leading axis of microbatches.

    Each takes rows from all of the batch, and so from every device that holds some of it.
    """
    if x.shape[0] % parts:
        raise SettingsError(f"{parts} microbatches do not divide a batch of {x.shape[0]} rows")
    return jnp.reshape(x, (-1, parts, *x.shape[1:])).swapaxes(0, 1)


def squares_of(grads: Any) -> Float[Array, " variable"]:
    """Returns the squared norm of each array of a gradient, in float32."""
    leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(grads)]
    return jnp.stack([jnp.sum(jnp.square(x)) for x in leaves])
