"""DoRA for Flax Linen: a method interceptor around `Module.apply`.

The adapters travel inside `params`, next to the kernels they adapt, so that whatever the model does
with its own parameters (`nn.scan`, `nn.vmap`, `nn.remat`, `nn.share_scope`) it does with them.
"""

from dora_jax.linen.adapt import apply_dora
from dora_jax.linen.inference import apply_mixed, disabled_adapters, precompute_scales
from dora_jax.linen.merge import merge
from dora_jax.linen.model import DoRAModel, check_adapters, check_base, remembered
from dora_jax.linen.quantized import quantize
from dora_jax.linen.sharding import shardings
from dora_jax.linen.tracing import ExampleCall

__all__ = [
    "DoRAModel",
    "ExampleCall",
    "apply_dora",
    "apply_mixed",
    "check_adapters",
    "check_base",
    "disabled_adapters",
    "merge",
    "precompute_scales",
    "quantize",
    "remembered",
    "shardings",
]
