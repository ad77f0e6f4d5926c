"""Configurations of models, read from Hugging Face's `config.json` and checked."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dora_jax import huggingface
from experiments.models.config_keys import own_classes, unread_keys

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Collection, Mapping


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
"""Fields of every configuration that are positive integers."""
_LARGEST_SIZE = 2**31
_LARGEST_NUMBER = 10**30  # 1e38 is the largest float32


class ModelConfigError(ValueError):
    """A configuration is incomplete, contradicts itself, or is not implemented here."""


class HuggingFaceConfig:
    """Base class of the models' configurations, which are dataclasses.

    A subclass names its fields as `config.json` does, and checks them when it is made.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ()
    """Fields that a `config.json` must have."""
    FIXED: ClassVar[Mapping[str, Any]] = {}
    """Switches that change the computation, with the only value that is implemented."""
    MODEL_TYPES: ClassVar[Collection[str]] = ()
    """The values of `model_type` that are implemented."""
    ALSO_READ: ClassVar[Collection[str]] = ()
    """Keys of a `config.json` that become fields of another name."""

    @classmethod
    def from_json(cls, path: pathlib.Path) -> Self:
        """Reads a Hugging Face `config.json`.

        Fields that are absent get Hugging Face's own defaults. Fields that do not change what the
        model computes are ignored, and all others are refused.

        Args:
            path: The file.

        Raises:
            MissingFileError: There is no such file.
            ModelConfigError: The file is not JSON, misses a required field, or asks for a variant
                that is not implemented. The message names the file and the field.
        """
        if not os.path.lexists(path):
            raise huggingface.MissingFileError(
                f"{path} is missing: a Hugging Face checkpoint folder holds config.json "
                "and its weights."
            )
        try:
            stored = huggingface.read_json(path)
        except huggingface.CheckpointError as error:
            raise ModelConfigError(f"{error}.") from error
        try:
            cls._check_stored(stored)
            return cls(**cls.fields_of(stored))
        except ModelConfigError as error:
            raise ModelConfigError(f"{path}: {error}") from error

    @classmethod
    def fields_of(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class in a parsed `config.json`; null counts as absent."""
        assert dataclasses.is_dataclass(cls)
        names = {field.name for field in dataclasses.fields(cls)}
        return {k: v for k, v in stored.items() if k in names and v is not None}

    @classmethod
    def _check_stored(cls, stored: Any) -> None:
        if not isinstance(stored, dict):
            raise ModelConfigError("the file must hold one JSON object.")
        if "model_type" in stored:
            _check_one_of("model_type", stored["model_type"], cls.MODEL_TYPES)
        if missing := [name for name in cls.REQUIRED if stored.get(name) is None]:
            raise ModelConfigError(
                f"missing {', '.join(missing)}. Add them: the weights alone do not tell."
            )
        for name, implemented in cls.FIXED.items():
            if stored.get(name) not in (None, implemented):
                raise ModelConfigError(
                    f"{name} is {stored[name]!r:.200}; only {implemented!r} is implemented. "
                    "Use another checkpoint."
                )
        if classes := own_classes(stored):
            raise ModelConfigError(
                f"auto_map has {classes[0]!r:.200}, code of the checkpoint's own, which may "
                "compute anything and is not run. Use another checkpoint."
            )
        if unread := unread_keys(stored, cls.known_keys()):
            raise ModelConfigError(
                f"{unread[0]} is {stored[unread[0]]!r:.200}, which is not known. Use another "
                "checkpoint; or, if it does not change what the model computes, delete it there."
            )

    @classmethod
    def known_keys(cls) -> set[str]:
        """Returns the keys that are read or checked."""
        assert dataclasses.is_dataclass(cls)
        return {*(field.name for field in dataclasses.fields(cls)), *cls.FIXED, *cls.ALSO_READ}

    def _check_choice(self, name: str, choices: Collection[str]) -> None:
        _check_one_of(name, getattr(self, name), choices)

    def _check_size(self, name: str) -> None:
        size = getattr(self, name)
        if type(size) is not int or not 1 <= size < _LARGEST_SIZE:
            raise ModelConfigError(
                f"{name} must be a positive integer below 2^31, not {_shown(size)}."
            )

    def _check_number(self, name: str, *, least: float = -math.inf) -> None:
        """Raises unless a field is a finite number above `least`."""
        check_number(name, getattr(self, name), least=least)

    def _check_multiple(self, name: str, divisor: str) -> None:
        value, by = getattr(self, name), getattr(self, divisor)
        if value % by:
            raise ModelConfigError(f"{name} {value} is not a multiple of {divisor} {by}.")


def check_number(name: str, value: Any, *, least: float = -math.inf) -> None:
    """Raises `ModelConfigError` unless a value is a finite number above `least`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and -_LARGEST_NUMBER < value < _LARGEST_NUMBER and value > least):
        kind = "a positive number" if least == 0 else "a number"
        raise ModelConfigError(f"{name} must be {kind}, not {_shown(value)}.")


def _check_one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise ModelConfigError(
            f"{name} {_shown(value)} is not implemented: use one of {list(choices)}."
        )


def _shown(value: Any) -> str:
    """Returns a value for an error; Python refuses to print an integer of thousands of digits."""
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        return "an integer of over 30 digits"
    return f"{value!r:.200}"
