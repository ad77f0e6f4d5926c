"""The rotary embeddings of a decoder: their base and scaling, as a `config.json` gives them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from experiments.models.config_file import ModelConfigError, check_number

if TYPE_CHECKING:
    from collections.abc import Mapping

_LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Keys of `rope_scaling` and `rope_parameters`; "type" in older files.
_KEYS = {"type", "rope_type", "factor", "rope_theta", "partial_rotary_factor", *_LLAMA3_FIELDS}
_HARMLESS = {"finetuned"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than in pretraining.

    Attributes:
        rope_type: `"linear"` divides every frequency by `factor` (arXiv 2306.15595); `"llama3"`
            divides low frequencies, keeps high ones, and interpolates between them (LLaMA 3.1).
        factor: The divisor.
        low_freq_factor: For `"llama3"`. Frequencies are low if their wavelength is above
            `original_max_position_embeddings / low_freq_factor`.
        high_freq_factor: For `"llama3"`. Frequencies are high if their wavelength is below
            `original_max_position_embeddings / high_freq_factor`.
        original_max_position_embeddings: For `"llama3"`. Tokens in a sequence of the pretraining.

    Raises:
        ModelConfigError: A field is out of range, or the type is not implemented.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ModelConfigError(
                f"rope_type {self.rope_type!r:.200} is not implemented: use a checkpoint with "
                "'default', 'linear' or 'llama3' rotary frequencies."
            )
        needed = ("factor", *(_LLAMA3_FIELDS if self.rope_type == "llama3" else ()))
        for name in needed:
            check_number(f"rope_scaling's {name}", getattr(self, name), least=0)
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ModelConfigError("rope_scaling's low_freq_factor must not be high_freq_factor.")


def read_rope(stored: Mapping[str, Any]) -> tuple[float | None, RopeScaling | None]:
    """Returns the base and the scaling that a parsed `config.json` gives; None for the default.

    The base stands beside `rope_scaling` or, from transformers 5 on, with the scaling in
    `rope_parameters`, which may be keyed by the kind of the layers. What is given twice must agree.

    Example:
        >>> read_rope({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})[0]
        500000.0

    Raises:
        ModelConfigError: A key is unknown or out of range, or two contradict each other.
    """
    given = {
        place: rope
        for name in ("rope_parameters", "rope_scaling")
        for place, rope in _objects(name, stored.get(name)).items()
    }
    thetas = {"rope_theta": stored.get("rope_theta")}
    thetas |= {f"{place}.rope_theta": rope.get("rope_theta") for place, rope in given.items()}
    for name, value in thetas.items():
        if value is not None:
            check_number(name, value, least=0)
    scalings = {place: _scaling(place, rope, stored) for place, rope in given.items()}
    _check_agree({name: value for name, value in thetas.items() if value is not None})
    _check_agree(scalings)
    theta = next((value for value in thetas.values() if value is not None), None)
    return theta, next(iter(scalings.values()), None)


def _objects(name: str, value: Any) -> dict[str, Mapping[str, Any]]:
    """Returns the objects in a field, by their places: one, or one for each kind of layer."""
    if value in (None, {}):
        return {}
    if not isinstance(value, dict):
        raise ModelConfigError(f"{name} must be an object, not {value!r:.200}.")
    if all(isinstance(inner, dict) for inner in value.values()):
        return {f"{name}.{kind}": inner for kind, inner in value.items()}
    return {name: value}


def _scaling(place: str, given: Mapping[str, Any], stored: Mapping[str, Any]) -> RopeScaling | None:
    rope = {name: value for name, value in given.items() if value is not None}
    for name, value in rope.items():
        if name not in _KEYS | _HARMLESS:
            _refuse_other_type(rope)
            raise ModelConfigError(f"{place}.{name} is {value!r:.200}, which is not known.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelConfigError(
            f"{place}.partial_rotary_factor is {rope['partial_rotary_factor']!r:.200}; only 1.0 is "
            "implemented. Use another checkpoint."
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", rope_type) != rope_type:
        raise ModelConfigError(
            f"{place} has rope_type {rope_type!r:.200} and type {rope['type']!r:.200}: delete one."
        )
    if rope_type == "default":
        scaled = [n for n in ("factor", *_LLAMA3_FIELDS[:2]) if rope.get(n, 1.0) != 1.0]
        if scaled:
            raise ModelConfigError(
                f"{place}.{scaled[0]} is {rope[scaled[0]]!r:.200}, but its rope_type is 'default', "
                "which does not scale. Add the rope_type, such as 'linear' or 'llama3'."
            )
        return None
    fields: dict[str, Any] = {name: rope.get(name) for name in ("factor", *_LLAMA3_FIELDS)}
    if rope_type == "llama3" and _LLAMA3_FIELDS[2] not in given:
        fields[_LLAMA3_FIELDS[2]] = stored.get("max_position_embeddings")
    if rope_type == "linear":
        fields = {"factor": fields["factor"]}
    return RopeScaling(rope_type=rope_type, **fields)


def _refuse_other_type(rope: Mapping[str, Any]) -> None:
    """Raises for a type that is not implemented, which explains its keys."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        RopeScaling(
            rope_type=rope_type,
            factor=1.0,
            low_freq_factor=1.0,
            high_freq_factor=2.0,
            original_max_position_embeddings=1,
        )


def _check_agree(values: Mapping[str, Any]) -> None:
    """Raises unless all places have one value."""
    names = list(values)
    for name in names[1:]:
        if values[name] != values[names[0]]:
            raise ModelConfigError(
                f"{names[0]} and {name} disagree: {values[names[0]] or 'no scaling'} and "
                f"{values[name] or 'no scaling'}. Delete the one that is wrong."
            )
