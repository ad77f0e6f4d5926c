"""Training adapters: the optimiser, with learning rates by kind of array; ranks that adapt."""

from dora_jax.training.adaptive_rank import (
    AdaptiveRankState,
    adaptive_rank,
    component_scores,
)
from dora_jax.training.optimizer import dora_optimizer
from dora_jax.training.orthogonality import orthogonality_penalty
from dora_jax.training.sharding import optimizer_shardings

__all__ = [
    "AdaptiveRankState",
    "adaptive_rank",
    "component_scores",
    "dora_optimizer",
    "optimizer_shardings",
    "orthogonality_penalty",
]
