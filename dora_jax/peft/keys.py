"""The tensors of a PEFT file, grouped by their keys.

A key is a prefix, the name of a module, and a part: `base_model.model.` `layers.0.up`
`.lora_A.weight`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dora_jax.peft.config import FILE, PeftConfig, PeftError

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# The layers that PEFT adapts in different ways.
Kind = Literal["linear", "conv", "embedding"]
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
_WEIGHT = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": MAGNITUDE}
_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B", "magnitude": MAGNITUDE}
PARTS: dict[Kind, dict[str, str]] = {
    "linear": _WEIGHT,
    "conv": _WEIGHT,
    "embedding": _EMBEDDING,
}
"""For each kind of layer, the last part of the key of each of its arrays."""
_ARRAY_NAMES = {part: name for parts in PARTS.values() for name, part in parts.items()}


def tensor_key(module: str, part: str) -> str:
    """Returns the key of a tensor of a module.

    Example:
      >>> tensor_key("up", "lora_A.weight")
      'base_model.model.up.lora_A.weight'
    """
    return f"{PREFIX}{module}.{part}"


@dataclasses.dataclass(frozen=True)
class ModuleTensors:
    """The adapter of one Hugging Face module, in PEFT's layout.

    Attributes:
      module: the module's name.
      parts: the tensors by the last part of their keys.
    """

    module: str
    parts: Mapping[str, Array]

    @property
    def kind(self) -> Kind:
        """Which of PEFT's layers the module is, as its tensors show."""
        if any(part in self.parts for part in ("lora_embedding_A", "lora_embedding_B")):
            return "embedding"
        a = self.parts.get("lora_A.weight")
        return "conv" if a is not None and a.ndim > 2 else "linear"

    @property
    def arrays(self) -> dict[str, Array]:
        """The tensors by the names of an adapter's arrays: `lora_a`, `lora_b`, `magnitude`."""
        return {_ARRAY_NAMES[part]: x for part, x in self.parts.items()}

    def key(self, name: str) -> str:
        """Returns the key of one of its arrays, such as `lora_a`."""
        return tensor_key(self.module, PARTS[self.kind][name])


def group_tensors(
    config: PeftConfig, tensors: Mapping[str, Array], unused: Sequence[str] = ()
) -> tuple[dict[str, ModuleTensors], dict[str, Array]]:
    """Returns the adapters of a file by module, and the tensors of modules that are saved whole.

    Args:
      config: of the same folder.
      tensors: by key.
      unused: names of modules, or their ends, whose tensors are left out.

    Returns:
      The adapters by module name; the other tensors by name, without the prefix.

    Raises:
      PeftError: a key is not one of PEFT's, an adapter is incomplete, or the configuration is of
        another adapter; names the key.
    """
    parts: dict[str, dict[str, Array]] = collections.defaultdict(dict)
    others = {}
    for key, x in tensors.items():
        module, part = _split_key(key)
        if any(module == u or module.endswith("." + u) for u in unused):
            continue
        if part not in _ARRAY_NAMES:
            others[f"{module}.{part}"] = x
        elif part in parts[module]:
            raise PeftError(f"{module} has two magnitudes, with and without '.weight': delete one")
        else:
            parts[module][part] = x
    adapters = {module: ModuleTensors(module, own) for module, own in parts.items()}
    for adapter in adapters.values():
        _check_parts(config, adapter)
        _check_shapes(config, adapter)
    return adapters, others


def _split_key(key: str) -> tuple[str, str]:
    """Returns the module of a key, and the rest: the part of an adapter, or a parameter's name."""
    name = key.removeprefix(PREFIX)
    if name == key:
        raise PeftError(f"{key} does not start with {PREFIX!r}: was it saved by PEFT?")
    # PEFT's parameter is called lora_magnitude_vector.weight. Its files leave out ".weight".
    if name.endswith(f".{MAGNITUDE}.weight"):
        name = name.removesuffix(".weight")
    for part in _ARRAY_NAMES:
        if name.endswith("." + part):
            return name.removesuffix("." + part), part
    if ".lora_" in name:
        raise PeftError(
            f"{key} is not one of the tensors that are read, {list(_ARRAY_NAMES)}: fetch the file "
            "again, or merge the adapter in PEFT (merge_and_unload)"
        )
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _check_parts(config: PeftConfig, adapter: ModuleTensors) -> None:
    """Raises `PeftError` unless the configuration asks for the tensors that a module has."""
    module = adapter.module
    if not (config.all_linear or config.selects(module) or config.may_select(module)):
        raise PeftError(
            f"the file holds an adapter of {module}, which target_modules does not select: the two "
            "files do not belong together"
        )
    wanted = set(PARTS[adapter.kind].values()) - (set() if config.use_dora else {MAGNITUDE})
    if missing := sorted(wanted - adapter.parts.keys()):
        raise PeftError(f"{tensor_key(module, missing[0])} is missing: fetch the file again")
    if unknown := sorted(adapter.parts.keys() - wanted):
        raise PeftError(
            f"{tensor_key(module, unknown[0])} is there although use_dora is {config.use_dora}: "
            "the two files do not belong together"
        )


def _check_shapes(config: PeftConfig, adapter: ModuleTensors) -> None:
    """Raises `PeftError` unless the factors have the rank of the configuration."""
    rank, arrays = config.rank(adapter.module), adapter.arrays
    for name, axis in (("lora_a", 0), ("lora_b", 1)):
        shape = arrays[name].shape
        if len(shape) < 2 or shape[axis] != rank:
            raise PeftError(
                f"{adapter.key(name)} has shape {shape}, but r or rank_pattern in {FILE} makes its "
                f"rank {rank}: the two files do not belong together"
            )
    if config.use_dora and arrays["magnitude"].size != len(arrays["lora_b"]):
        raise PeftError(
            f"{adapter.key('magnitude')} has {arrays['magnitude'].size} features, lora_B has "
            f"{len(arrays['lora_b'])}: fetch the file again"
        )
