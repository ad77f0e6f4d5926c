"""DoRA (Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353) for Flax.

The names that nearly every user types are here; the rest is reached by package, such as
`dora.adapters.diff`, `dora.layers.register_layout` or `dora.errors.ConfigError`.

Example:
  >>> import dora_jax as dora
  >>> from flax import nnx
  >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  >>> model = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(1))
  >>> optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-3), wrt=dora.DoRAParam)
"""

from dora_jax import interrupts as interrupts  # before the imports that take seconds

# isort: split
from dora_jax import adapters as adapters
from dora_jax import analysis as analysis
from dora_jax import checkpoint as checkpoint
from dora_jax import decomposition as decomposition
from dora_jax import errors as errors
from dora_jax import huggingface as huggingface
from dora_jax import layers as layers
from dora_jax import linen as linen
from dora_jax import model as model
from dora_jax import names as names
from dora_jax import nnx as nnx
from dora_jax import peft as peft
from dora_jax import training as training
from dora_jax.analysis import summary, weight_change
from dora_jax.api import (
    apply_dora,
    apply_mixed,
    check_base,
    disabled_adapters,
    from_qwix,
    merge,
    precompute_scales,
    quantize,
    shardings,
    start_from_error,
)
from dora_jax.checkpoint import Checkpoints, load, save
from dora_jax.config import DoRAConfig
from dora_jax.decomposition import Quantization
from dora_jax.errors import DoRAError
from dora_jax.linen import DoRAModel
from dora_jax.nnx import DoRAParam, get_adapters, set_adapters
from dora_jax.ops import save_scaled
from dora_jax.training import dora_optimizer, optimizer_shardings
from dora_jax.version import __version__

__all__ = [
    "Checkpoints",
    "DoRAConfig",
    "DoRAError",
    "DoRAModel",
    "DoRAParam",
    "Quantization",
    "__version__",
    "apply_dora",
    "apply_mixed",
    "check_base",
    "disabled_adapters",
    "dora_optimizer",
    "from_qwix",
    "get_adapters",
    "load",
    "merge",
    "optimizer_shardings",
    "precompute_scales",
    "quantize",
    "save",
    "save_scaled",
    "set_adapters",
    "shardings",
    "start_from_error",
    "summary",
    "weight_change",
]
