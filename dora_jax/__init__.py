"""DoRA (Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353) for Flax.

Example:
  >>> import dora_jax as dora
  >>> from flax import nnx
  >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  >>> model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
  >>> optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=dora.DoRAParam)
"""

from dora_jax.adapters import count_parameters
from dora_jax.config import AdapterError, ConfigError, DoRAConfig, DoRAError, LayoutError
from dora_jax.layouts import Layout, register_layout
from dora_jax.linen import DoRAModel
from dora_jax.nnx import DoRAParam, check_base, get_adapters, set_adapters
from dora_jax.optim import dora_optimizer, label_adapters
from dora_jax.transform import apply_dora, merge

__all__ = [
    "AdapterError",
    "ConfigError",
    "DoRAConfig",
    "DoRAError",
    "DoRAModel",
    "DoRAParam",
    "Layout",
    "LayoutError",
    "apply_dora",
    "check_base",
    "count_parameters",
    "dora_optimizer",
    "get_adapters",
    "label_adapters",
    "merge",
    "register_layout",
    "set_adapters",
]
