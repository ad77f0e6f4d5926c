"""Products and scales in the order that XLA compiles well, with their gradients.

Everything that needs a primitive of our own, or the names that a rematerialisation policy looks
for, is here. So is the look at a traced program, `kernel_uses`. No other folder imports
`jax.interpreters` or `jax.extend`. Nothing here knows Flax
or an adapter.
"""

from dora_jax.ops.choice import cheap_ways_alone
from dora_jax.ops.low_rank import down_projection, up_projection
from dora_jax.ops.output_scale import apply_scale, wide_dtype
from dora_jax.ops.remat import save_scaled

__all__ = [
    "apply_scale",
    "cheap_ways_alone",
    "down_projection",
    "save_scaled",
    "up_projection",
    "wide_dtype",
]
