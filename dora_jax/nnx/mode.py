"""The mode of an NNX model, train or eval, as the flags of its layers tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_jax.errors import Path

# What `model.eval()` and `model.train()` set.
FLAGS = ("deterministic", "use_running_average")
# For each part of a model that has flags, by path: whether all of a kind are set to eval.
Modes = Mapping[Path, Mapping[str, bool]]


def modes_of(modules: Mapping[Path, Any]) -> Modes:
    """Returns the modes of the parts of a model; empty if no layer has a flag.

    Args:
      modules: all modules of the model, by path.
    """
    modes: dict[Path, dict[str, bool]] = {}
    for path, module in modules.items():
        for name in FLAGS:
            if isinstance(flag := getattr(module, name, None), bool):
                for n in range(len(path) + 1):
                    own = modes.setdefault(path[:n], {})
                    own[name] = own.get(name, True) and flag
    return modes


def is_in_eval_mode(path: Path, modes: Modes) -> bool:
    """Returns whether a layer is in eval mode, as the smallest part of the model with flags says.

    The flags of dropout count before those of batch statistics, which a model may freeze while it
    trains. Without any flag it is train mode, as in a new Flax model.
    """
    for n in range(len(path), -1, -1):
        if flags := modes.get(path[:n]):
            return flags.get("deterministic", flags.get("use_running_average", False))
    return False
