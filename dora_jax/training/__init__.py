"""What training adapters takes besides a loss: the optimiser, with a rate for the magnitude."""

from dora_jax.training.optimizer import dora_optimizer

__all__ = [
    "dora_optimizer",
]
