"""What of a model is adapted, and how magnitude and direction move."""

from dora_jax.analysis.summary import LayerSummary, Summary, summary
from dora_jax.analysis.weight_change import WeightChange, weight_change

__all__ = [
    "LayerSummary",
    "Summary",
    "WeightChange",
    "summary",
    "weight_change",
]
