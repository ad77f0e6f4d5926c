"""The methods that are compared: full fine-tuning, LoRA, DoRA and ablations of DoRA."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import optax
from flax import nnx

import dora_jax as dora

M = TypeVar("M", bound=nnx.Module)

HEAD = "classifier"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        title: The name in tables and plots.
        switches: Fields of `DoRAConfig` that differ from their defaults. None trains all
            parameters and adds no adapters.
    """

    title: str
    switches: dict[str, Any] | None

    @property
    def trainable(self) -> type[nnx.Variable]:
        """The type of the variables that the method trains."""
        return nnx.Param if self.switches is None else dora.DoRAParam

    def adapt(
        self, model: M, *, rank: int, alpha: float, seed: int, call: tuple[Any, ...] | None = None
    ) -> M:
        """Returns the model with adapters in all linear layers and with a trainable head.

        With `call`, the arguments of a call, the kernels are checked to be the layers' alone.
        """
        if self.switches is None:
            return model
        config = dora.DoRAConfig(rank=rank, alpha=alpha, modules_to_save=[HEAD], **self.switches)
        return dora.apply_dora(model, config, rngs=nnx.Rngs(seed), inputs=call)

    def optimizer(
        self, learning_rate: optax.ScalarOrSchedule, magnitude_lr_ratio: float
    ) -> optax.GradientTransformation:
        """Returns AdamW without weight decay, with gradients clipped to norm 1."""
        if self.switches is None:
            return optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.0)
            )
        return dora.dora_optimizer(learning_rate, magnitude_lr_ratio=magnitude_lr_ratio)


METHODS = {
    "full": Method("full fine-tuning", None),
    "lora": Method("LoRA", {"decompose": False}),
    "dora": Method("DoRA", {}),
    "dora-frozen-magnitude": Method("DoRA, magnitude frozen", {"magnitude_trainable": False}),
    "dora-not-normalized": Method("DoRA, not normalised", {"normalize": False}),
}
