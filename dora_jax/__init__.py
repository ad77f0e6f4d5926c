"""DoRA (Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353) for Flax.

Example:
  >>> import dora_jax as dora
  >>> from flax import nnx
  >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  >>> model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
  >>> optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=dora.DoRAParam)
"""

from dora_jax import huggingface, names, peft
from dora_jax.adapters import (
    add_weighted,
    cast_adapters,
    count_parameters,
    diff,
    interpolate,
    label_adapters,
    select_adapters,
    stack_adapters,
)
from dora_jax.analysis import Summary, WeightChange, summary, weight_change
from dora_jax.api import (
    apply_dora,
    apply_mixed,
    check_base,
    disabled_adapters,
    merge,
    precompute_scales,
)
from dora_jax.checkpoint import Checkpoints, RestoredRun, SavedAdapters, load, read_adapters, save
from dora_jax.config import DoRAConfig
from dora_jax.decomposition import KernelAxes
from dora_jax.errors import AdapterError, CheckpointError, ConfigError, DoRAError, LayoutError
from dora_jax.layers import Layout, einsum_layout, register_layout
from dora_jax.linen import DoRAModel
from dora_jax.nnx import DoRAParam, get_adapters, set_adapters
from dora_jax.ops import save_scaled
from dora_jax.training import dora_optimizer

__all__ = [
    "AdapterError",
    "CheckpointError",
    "Checkpoints",
    "ConfigError",
    "DoRAConfig",
    "DoRAError",
    "DoRAModel",
    "DoRAParam",
    "KernelAxes",
    "Layout",
    "LayoutError",
    "RestoredRun",
    "SavedAdapters",
    "Summary",
    "WeightChange",
    "add_weighted",
    "apply_dora",
    "apply_mixed",
    "cast_adapters",
    "check_base",
    "count_parameters",
    "diff",
    "disabled_adapters",
    "dora_optimizer",
    "einsum_layout",
    "get_adapters",
    "huggingface",
    "interpolate",
    "label_adapters",
    "load",
    "merge",
    "names",
    "peft",
    "precompute_scales",
    "read_adapters",
    "register_layout",
    "save",
    "save_scaled",
    "select_adapters",
    "set_adapters",
    "stack_adapters",
    "summary",
    "weight_change",
]
