"""Configurations of models, read from Hugging Face's `config.json` and checked."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar, Self

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

    @classmethod
    def from_json(cls, path: pathlib.Path) -> Self:
        """Reads a Hugging Face `config.json`.

        Fields that are absent get Hugging Face's own defaults. Fields that the model does not need
        are ignored.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ModelConfigError: The file is not JSON, misses a required field, or asks for a variant
                that is not implemented. The message names the file and the field.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a Hugging Face checkpoint folder holds config.json "
                "and its weights."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelConfigError(f"{path} is not valid JSON: {error}. Fetch it again.") from error
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
        if missing := [name for name in cls.REQUIRED if name not in stored]:
            raise ModelConfigError(
                f"missing {', '.join(missing)}. Add them: the weights alone do not tell."
            )
        for name, implemented in cls.FIXED.items():
            if stored.get(name) not in (None, implemented):
                raise ModelConfigError(
                    f"{name} is {stored[name]!r}; only {implemented!r} is implemented. "
                    "Use another checkpoint."
                )

    def _check_choice(self, name: str, choices: Collection[str]) -> None:
        if (value := getattr(self, name)) not in choices:
            raise ModelConfigError(
                f"{name} {value!r} is not implemented: use one of {list(choices)}."
            )

    def _check_size(self, name: str) -> None:
        size = getattr(self, name)
        if type(size) is not int or size < 1:
            raise ModelConfigError(f"{name} must be a positive integer, not {size!r}.")

    def _check_multiple(self, name: str, divisor: str) -> None:
        value, by = getattr(self, name), getattr(self, divisor)
        if value % by:
            raise ModelConfigError(f"{name} {value} is not a multiple of {divisor} {by}.")
