"""The methods that are compared: full fine-tuning, LoRA, DoRA and ablations of DoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import optax
from flax import nnx

import dora_jax as dora

M = TypeVar("M", bound=nnx.Module)

HEAD = "classifier"

Base = Literal["float", "nf4", "int4", "int8", "fp8"]
"""What the kernels of a base lie in: as they are, or a format of `dora_jax.quantize`."""


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

    def config(self, rank: int, alpha: float, fields: Mapping[str, Any]) -> dora.DoRAConfig:
        """Returns the configuration of the adapters; the switches of the method come last.

        Args:
            rank: Rank of the adapters.
            alpha: The scaling is `alpha / rank`.
            fields: Further fields of `DoRAConfig`.

        Example:
            >>> METHODS["magnitude"].config(8, 16.0, {"eps": 1e-6}).rank
            0
        """
        return dora.DoRAConfig(**{"rank": rank, "alpha": alpha, **fields, **(self.switches or {})})

    def adapt(
        self,
        model: M,
        *,
        rank: int,
        alpha: float,
        seed: int,
        call: tuple[Any, ...] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> M:
        """Returns the model with adapters in all linear layers and with a trainable head.

        With `call`, the arguments of a call, the kernels are checked to be the layers' alone. With
        `fields`, of `DoRAConfig`, other layers are adapted or trained in full.
        """
        if self.switches is None:
            return model
        config = self.config(
            rank, alpha, {"modules_to_save": (HEAD,)} if fields is None else fields
        )
        return dora.apply_dora(model, config, rngs=nnx.Rngs(seed), inputs=call)

    def optimizer(
        self,
        learning_rate: optax.ScalarOrSchedule,
        magnitude_lr_ratio: optax.ScalarOrSchedule,
        magnitude_weight_decay: Any = 0.0,
    ) -> optax.GradientTransformation:
        """Returns AdamW, with gradients clipped to norm 1, and decay of magnitudes alone."""
        if self.switches is None:
            return optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.0)
            )
        return dora.dora_optimizer(
            learning_rate,
            magnitude_lr_ratio=magnitude_lr_ratio,
            magnitude_weight_decay=magnitude_weight_decay,
        )


METHODS = {
    "full": Method("full fine-tuning", None),
    "lora": Method("LoRA", {"decompose": False}),
    "dora": Method("DoRA", {}),
    "dora-frozen-magnitude": Method("DoRA, magnitude frozen", {"magnitude_trainable": False}),
    "dora-not-normalized": Method("DoRA, not normalised", {"normalize": False}),
    "dora-detached": Method("DoRA, norm detached", {"norm_gradient": "detached"}),
    "magnitude": Method("magnitude alone", {"rank": 0}),
}
