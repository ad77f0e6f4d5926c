"""Training adapters: the optimiser, with a learning rate for each kind of array."""

from dora_jax.training.optimizer import dora_optimizer
from dora_jax.training.sharding import optimizer_shardings

__all__ = [
    "dora_optimizer",
    "optimizer_shardings",
]
