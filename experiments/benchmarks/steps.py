"""Training steps that are compared: pure functions of their arrays, alike but for the method.

Every step differentiates what its method trains and nothing else, clips the gradient and applies
AdamW. The frozen parameters are an argument, not constants of the program, and nothing is donated.
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

    # Pytrees of arrays, or of jax.ShapeDtypeStruct: what is trained, what is not, and so on.
    Tree = Any
    Loss = Callable[[nnx.Module, Tree], Float[Array, ""]]
    Step = Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree, Float[Array, ""]]]

LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Which layers are adapted, and how large the adapter is.

    Attributes:
        targets: A regular expression that matches an adapted layer's whole dotted path.
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
        title: As in tables and plots.
        switches: Fields of `DoRAConfig` that differ from DoRA's.
        by_hand: A layer of `reference` that is used in place of the library.
        full: Whether everything is trained, and nothing adapted.
        hoisted: Whether the scales are computed once for all microbatches.
    """

    title: str
    switches: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_hand: type[LoRAByHand] | None = None
    full: bool = False
    precomputed: bool = False

    @property
    def trainable(self) -> type[nnx.Variable]:
        """The type of the variables it trains."""
        return nnx.Param if self.full else dora.DoRAParam

    def adapt(self, model: nnx.Module, adapter: Adapter, seed: int) -> nnx.Module:
        """Returns the model as the method trains it."""
        rngs = nnx.Rngs(seed)
        if self.full:
            return model
        sizes: dict[str, Any] = {"rank": adapter.rank, "alpha": adapter.alpha}
        if self.by_hand is not None:
            return replace_linears(model, self.by_hand, adapter.targets, **sizes, rngs=rngs)
        config = dora.DoRAConfig(target_modules=adapter.targets, **sizes, **self.switches)
        return dora.apply_dora(model, config, rngs=rngs)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, with gradients clipped to norm 1."""
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
    """A step and the arrays it starts from, concrete or abstract.

    Attributes:
        step: `step(trainable, frozen, opt_state, batch) -> (trainable, opt_state, loss)`.
        trainable: What the method trains.
        frozen: Everything else of the model.
        opt_state: Of the optimiser.
    """

    step: Step
    trainable: Tree
    frozen: Tree
    opt_state: Tree

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))


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
        model: The pretrained model; its arrays may be abstract (`nnx.eval_shape`).
        adapter: What is adapted.
        loss: The mean loss of a batch.
        microbatches: Into how many equal parts the leading axis of the batch is split; their
            gradients are averaged.
        unroll: Whether their loop is unrolled. XLA's cost analysis counts the body of one that is
            not a single time.
    """
    abstract = isinstance(jax.tree.leaves(nnx.state(model))[0], jax.ShapeDtypeStruct)
    adapt = functools.partial(method.adapt, adapter=adapter, seed=1)
    adapted = nnx.eval_shape(adapt, model) if abstract else adapt(model)
    parts: Any = nnx.split(adapted, method.trainable, ...)
    graphdef, trainable, frozen = parts
    tx = method.optimizer()
    gradient = _hoisted_gradient if method.precomputed else _gradient

    def step(
        trainable: Tree, frozen: Tree, opt_state: Tree, batch: Tree
    ) -> tuple[Tree, Tree, Float[Array, ""]]:
        value, grads = gradient(graphdef, loss, trainable, frozen, batch, microbatches, unroll)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return Program(step, trainable, frozen, jax.eval_shape(tx.init, trainable))


def _gradient(
    graphdef: Any,
    loss: Loss,
    trainable: Tree,
    frozen: Tree,
    batch: Tree,
    microbatches: int,
    unroll: bool,
) -> tuple[Float[Array, ""], Tree]:
    """Returns the loss, and its gradient with respect to `trainable`."""

    def value_and_grad(batch: Tree) -> tuple[Float[Array, ""], Tree]:
        def loss_of(trainable: Tree) -> Float[Array, ""]:
            return loss(nnx.merge(graphdef, trainable, frozen, copy=True), batch)

        return jax.value_and_grad(loss_of)(trainable)

    if microbatches == 1:
        return value_and_grad(batch)
    # Each microbatch takes rows from all over the batch, and so from every device it lies on.
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(part)), None),
        zeros,
        parts,
        unroll=unroll,
    )
    return jax.tree.map(lambda x: x / microbatches, total)


def _hoisted_gradient(
    graphdef: Any,
    loss: Loss,
    trainable: Tree,
    frozen: Tree,
    batch: Tree,
    microbatches: int,
    unroll: bool,
) -> tuple[Float[Array, ""], Tree]:
    """Likewise; the scales are computed, and differentiated, once for all microbatches."""
    static: dict[str, Any] = {}

    def precompute_scales(trainable: Tree) -> tuple[Tree, Tree]:
        hoisted = dora.precompute_scales(nnx.merge(graphdef, trainable, frozen, copy=True))
        parts: Any = nnx.split(hoisted, dora.DoRAParam, ...)
        static["graphdef"], scaled, rest = parts
        return scaled, rest

    scaled, pull_back, frozen = jax.vjp(precompute_scales, trainable, has_aux=True)
    value, grads = _gradient(static["graphdef"], loss, scaled, frozen, batch, microbatches, unroll)
    return value, pull_back(grads)[0]
