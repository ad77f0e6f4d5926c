"""Which module of a model each tensor of a PEFT file is of."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dora_jax.errors import Path
from dora_jax.names.name_map import NameMap
from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.keys import _MAGNITUDE, _PARTS, PREFIX

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]


def split_tensors(
    config: PeftConfig,
    tensors: Mapping[str, Array],
    known: Mapping[str, Any],
    unused: Sequence[str],
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Returns the adapters' tensors by module and part, and all others by name; checks both."""
    adapters: dict[str, dict[str, Array]] = collections.defaultdict(dict)
    others = {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise PeftError(f"{key} does not start with {PREFIX!r}: was it saved by PEFT?")
        part = next((part for part in _PARTS if name.endswith("." + part)), None)
        module = name.removesuffix(f".{part}") if part else name.rpartition(".")[0]
        if any(module == u or module.endswith("." + u) for u in unused):
            continue
        if part is None:
            others[name] = x
            continue
        part = part.removesuffix(".weight") if part.startswith(_MAGNITUDE) else part
        if part in adapters[module]:
            raise PeftError(f"{module} has two magnitudes, with and without '.weight': delete one")
        adapters[module][part] = x
    for module, parts in adapters.items():
        _check_module(config, module, parts, known)
    if not config.all_linear:
        for module in known:
            if config.selects(module) and not (module in adapters or config.may_select(module)):
                raise PeftError(
                    f"target_modules names {module}, but the file holds no adapter of it: fetch it "
                    "again"
                )
    return dict(adapters), others


def _check_module(
    config: PeftConfig, module: str, parts: Mapping[str, Array], known: Mapping[str, Any]
) -> None:
    """Raises `PeftError` unless a module is one of the model's, and its tensors are complete."""
    if module not in known:
        near = difflib.get_close_matches(module, known, n=3, cutoff=0.0)
        raise PeftError(
            f"the file holds an adapter of {module}, which the model or the name map does not "
            f"have. Nearest names: {near}. If the model does without it: unused=[{module!r}]"
        )
    if not (config.all_linear or config.selects(module) or config.may_select(module)):
        raise PeftError(
            f"the file holds an adapter of {module}, which target_modules does not select: the two "
            "files do not belong together"
        )
    embedding = any(part.startswith("lora_embedding") for part in parts)
    wanted = set(_PARTS[2:4] if embedding else _PARTS[:2])
    if config.use_dora:
        wanted.add(_MAGNITUDE)
    if missing := sorted(wanted - parts.keys()):
        raise PeftError(f"{PREFIX}{module}.{missing[0]} is missing: fetch the file again")
    if unknown := sorted(parts.keys() - wanted):
        raise PeftError(
            f"{PREFIX}{module}.{unknown[0]} is there although use_dora is {config.use_dora}: the "
            "two files do not belong together"
        )


def saved_parameters(
    config: PeftConfig,
    others: Mapping[str, Array],
    parameters: Mapping[Path, Any],
    names: NameMap,
    known: Mapping[str, tuple[Path, tuple[int, ...]]],
) -> dict[Path, Array]:
    """Returns the parameters of modules that are trained in full, by path.

    Raises:
      PeftError: a tensor is of no such module, or a module's are not all there.
    """
    left = dict(others)

    def take(name: str) -> Array:
        if name not in left:
            raise PeftError(
                f"{PREFIX}{name} is missing, although modules_to_save has its module: fetch the "
                "file again"
            )
        return left.pop(name)

    modules = {name.rpartition(".")[0] for name in others}
    saved = {
        known[module][0]
        for module in known
        if config.saves(module) or (module in modules and config.may_save(module))
    }
    values = {
        path: names.from_hf(".".join(path), np.shape(value), take)
        for path, value in parameters.items()
        if path[:-1] in saved
    }
    for name, x in left.items():
        module, _, parameter = name.rpartition(".")
        table = module.removesuffix(".base_layer")
        if table == module or parameter != "weight" or table not in known:
            raise PeftError(
                f"{PREFIX}{name} is neither part of an adapter nor of a module in modules_to_save "
                f"({list(config.modules_to_save)}) that the model has. PEFT saves the embedding if "
                "the vocabulary was resized: put that into the base first, then delete it here"
            )
        _check_table(name, x, table, known[table][0], parameters, names)
    return values


def _check_table(
    name: str, x: Array, module: str, path: Path, parameters: Mapping[Path, Any], names: NameMap
) -> None:
    """Raises `PeftError` if the weight of an adapted layer, as PEFT saved it, is not the base's.

    PEFT saves the weights of adapted embeddings and heads with the adapter.
    """
    for parameter, value in parameters.items():
        dotted = ".".join(parameter)
        if parameter[:-1] != path or names.find(".".join(path)).stacked:
            continue
        if names.tensor_names(dotted) != [f"{module}.weight"]:
            continue
        if isinstance(value, jax.ShapeDtypeStruct):
            return
        own, stored = np.asarray(value), names.from_hf(dotted, value.shape, lambda _: x)
        # One of the two may have been cast.
        if np.array_equal(own.astype(x.dtype), stored):
            return
        if np.array_equal(own, stored.astype(own.dtype)):
            return
    raise PeftError(
        f"{PREFIX}{name} is not the weight that the model has: it was trained or resized there. "
        "Put it into the base first"
    )
