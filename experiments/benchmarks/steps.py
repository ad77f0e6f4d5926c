"""Training steps of all methods, as pure functions of their arrays.

Every step takes the gradient of the arrays that its method trains, clips it and applies AdamW. The
frozen parameters are an argument, not constants of the program. No argument is donated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dora_jax as dora
from experiments.benchmarks.reference import DoRAMaterialized, LoRAByHand, replace_linears

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    # Pytrees of arrays or of jax.ShapeDtypeStruct.
    Tree = Any
    Loss = Callable[[nnx.Module, Tree], Float[Array, ""]]
    Step = Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree, Float[Array, ""]]]

LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The layers that are adapted, and the sizes of the adapters.

    Attributes:
        targets: A regular expression for the whole dotted path of an adapted layer.
        rank: Rank r.
        alpha: The scaling is `alpha / rank`.
    """

    targets: str
    rank: int
    alpha: float = 16.0


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        title: The name in tables and plots.
        switches: Fields of `DoRAConfig` that differ from their defaults.
        by_hand: A layer of `reference` to use instead of the library.
        full: Whether all parameters are trained and no layer is adapted.
        precomputed: Whether the scales are computed once for all microbatches.
    """

    title: str
    switches: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_hand: type[LoRAByHand] | None = None
    full: bool = False
    precomputed: bool = False

    @property
    def trainable(self) -> type[nnx.Variable]:
        """The type of the variables that the method trains."""
        return nnx.Param if self.full else dora.DoRAParam

    def adapt(self, model: nnx.Module, adapter: Adapter, seed: int) -> nnx.Module:
        """Returns the model with the adapters of the method."""
        rngs = nnx.Rngs(seed)
        if self.full:
            return model
        sizes: dict[str, Any] = {"rank": adapter.rank, "alpha": adapter.alpha}
        if self.by_hand is not None:
            return replace_linears(model, self.by_hand, adapter.targets, **sizes, rngs=rngs)
        config = dora.DoRAConfig(target_modules=adapter.targets, **sizes, **self.switches)
        return dora.apply_dora(model, config, rngs=rngs)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW, with gradients clipped to norm 1."""
        if self.full:
            return optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.0)
            )
        return dora.dora_optimizer(LEARNING_RATE)


METHODS = {
    "full": Method("full fine-tuning", full=True),
    "lora-by-hand": Method("LoRA, written by hand", by_hand=LoRAByHand),
    "lora": Method("LoRA", {"decompose": False}),
    "dora": Method("DoRA, exact gradient"),
    "dora-detached": Method("DoRA, detached norm", {"norm_gradient": "detached"}),
    "dora-hoisted": Method("DoRA, hoisted", precomputed=True),
    "dora-materialized": Method("DoRA, materialised by hand", by_hand=DoRAMaterialized),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step, and the arrays at its start, which may be abstract.

    Attributes:
        step: `step(trainable, frozen, opt_state, batch) -> (trainable, opt_state, loss)`.
        trainable: The arrays that the method trains.
        frozen: All other arrays of the model.
        opt_state: The state of the optimiser.
    """

    step: Step
    trainable: Tree
    frozen: Tree
    opt_state: Tree

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of a model as a function of its arrays, and the split into microbatches."""

    graphdef: Any
    of_batch: Loss
    microbatches: int
    unroll: bool

    def gradient(self, trainable: Tree, frozen: Tree, batch: Tree) -> tuple[Float[Array, ""], Tree]:
        """Returns the loss, and its gradient with respect to `trainable`."""

        def value_and_grad(batch: Tree) -> tuple[Float[Array, ""], Tree]:
            def loss_of(trainable: Tree) -> Float[Array, ""]:
                return self.of_batch(nnx.merge(self.graphdef, trainable, frozen, copy=True), batch)

            return jax.value_and_grad(loss_of)(trainable)

        if self.microbatches == 1:
            return value_and_grad(batch)
        # Each microbatch takes rows from the whole batch, and so from every device that holds it.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, self.microbatches, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(part)), None),
            zeros,
            parts,
            unroll=self.unroll,
        )
        return jax.tree.map(lambda x: x / self.microbatches, total)

    def gradient_of_precomputed_scales(
        self, trainable: Tree, frozen: Tree, batch: Tree
    ) -> tuple[Float[Array, ""], Tree]:
        """Like `gradient`, but computes and differentiates the scales once for all microbatches."""
        static: dict[str, Any] = {}

        def precompute_scales(trainable: Tree) -> tuple[Tree, Tree]:
            model = nnx.merge(self.graphdef, trainable, frozen, copy=True)
            parts: Any = nnx.split(dora.precompute_scales(model), dora.DoRAParam, ...)
            static["graphdef"], scaled, rest = parts
            return scaled, rest

        scaled, pull_back, frozen = jax.vjp(precompute_scales, trainable, has_aux=True)
        loss = dataclasses.replace(self, graphdef=static["graphdef"])
        value, grads = loss.gradient(scaled, frozen, batch)
        return value, pull_back(grads)[0]


def _of_shapes(change: Callable[[nnx.Module], nnx.Module], model: nnx.Module) -> nnx.Module:
    """Returns what a function makes of a model of shapes.

    On a mesh, `nnx.eval_shape` takes a quantised kernel for an array: it returns the shape of one.
    """
    graphdef, state = nnx.split(model)
    static: dict[str, Any] = {}

    def arrays(state: Tree) -> Tree:
        static["graphdef"], changed = nnx.split(change(nnx.merge(graphdef, state)))
        return changed

    changed = jax.eval_shape(arrays, state)
    return nnx.merge(static["graphdef"], changed)


def make_program(
    method: Method,
    model: nnx.Module,
    adapter: Adapter,
    loss: Loss,
    *,
    microbatches: int = 1,
    unroll: bool = False,
) -> Program:
    """Returns the training step of a method for a model.

    Args:
        method: From `METHODS`.
        model: The pretrained model. Its arrays may be abstract (`nnx.eval_shape`).
        adapter: The layers that are adapted, and the sizes of the adapters.
        loss: The mean loss of a batch.
        microbatches: Number of equal parts of the batch along its leading axis. Their gradients are
            averaged.
        unroll: Whether the loop over microbatches is unrolled. XLA's cost analysis counts the body
            of a loop once.
    """
    abstract = isinstance(jax.tree.leaves(nnx.state(model))[0], jax.ShapeDtypeStruct)
    adapt = functools.partial(method.adapt, adapter=adapter, seed=1)
    adapted = _of_shapes(adapt, model) if abstract else adapt(model)
    parts: Any = nnx.split(adapted, method.trainable, ...)
    graphdef, trainable, frozen = parts
    tx = method.optimizer()
    of_arrays = _Loss(graphdef, loss, microbatches, unroll)
    gradient = (
        of_arrays.gradient_of_precomputed_scales if method.precomputed else of_arrays.gradient
    )

    def step(
        trainable: Tree, frozen: Tree, opt_state: Tree, batch: Tree
    ) -> tuple[Tree, Tree, Float[Array, ""]]:
        value, grads = gradient(trainable, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return Program(step, trainable, frozen, jax.eval_shape(tx.init, trainable))
