"""The adapted layers of a model, and how their magnitude and direction change in training."""

from dora_jax.analysis.change_rank import ChangeRank, change_rank
from dora_jax.analysis.plots import plot_weight_change
from dora_jax.analysis.summary import LayerSummary, Summary, summary
from dora_jax.analysis.weight_change import WeightChange, weight_change

__all__ = [
    "ChangeRank",
    "LayerSummary",
    "Summary",
    "WeightChange",
    "change_rank",
    "plot_weight_change",
    "summary",
    "weight_change",
]
