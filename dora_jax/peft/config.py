"""`adapter_config.json`: the fields of a Hugging Face PEFT adapter that decide what it computes.

Each field means what it does in PEFT 0.17 to 0.21. A field that is not known here is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from dora_jax.disk.json_file import parse_json
from dora_jax.errors import CheckpointError
from dora_jax.peft.fields import FILE, PeftError, checked, matcher, no_constant, refuse, unique
from dora_jax.validation import pattern_matches


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields of `adapter_config.json`, with the meaning that PEFT's `LoraConfig` gives them.

    Attributes:
      r, lora_alpha, lora_dropout, use_rslora, use_dora, rank_pattern, alpha_pattern: the fields
        `rank`, `alpha`, `dropout`, `use_rslora`, `decompose` and the patterns of `DoRAConfig`.
      target_modules: names of modules or their ends, or a regular expression for the whole name.
      exclude_modules: modules that are left out, in the same form.
      layers_to_transform: if not empty, only modules with one of these layer numbers are selected.
      layers_pattern: the names that a layer number may follow; any name if empty.
      modules_to_save: modules that are trained in full and saved whole.
      fan_in_fan_out: the base stores weights as (in, out); the adapter's tensors are not affected.
      base_model_name_or_path, task_type, inference_mode: used by PEFT when it loads a model.
    """

    r: int
    lora_alpha: float
    target_modules: str | Sequence[str]
    use_dora: bool = False
    lora_dropout: float = 0.0
    use_rslora: bool = False
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: Sequence[int] = ()
    layers_pattern: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    inference_mode: bool = True

    @classmethod
    def from_json(cls, text: str) -> PeftConfig:
        """Reads the text of `adapter_config.json`.

        Raises:
          PeftError: it is no JSON object; or a field is missing, of a wrong type, or asks for
            something that is not implemented; names the field.
        """
        try:
            fields = parse_json(text, FILE, parse_constant=no_constant, object_pairs_hook=unique)
        except CheckpointError as error:
            raise PeftError(str(error)) from error
        if not isinstance(fields, dict):
            raise PeftError(f"{FILE} must hold a JSON object, got {type(fields).__name__}")
        own = {field.name for field in dataclasses.fields(cls)}
        refuse(fields, own)
        values = {name: value for name, value in fields.items() if name in own}
        for name in ("r", "lora_alpha", "target_modules"):
            if values.get(name) in (None, [], ""):
                raise PeftError(f"{FILE} has no {name}; fetch it again")
        # PEFT writes null for a field that is not set, and takes "" for null in layers_pattern.
        return cls(**{k: checked(k, v) for k, v in values.items() if v not in (None, "")})

    def to_json(self) -> str:
        """Returns the text of an `adapter_config.json` that PEFT reads without a warning."""
        fields = dataclasses.asdict(self)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            fields[name] = fields[name] or None
        fields |= {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
        return json.dumps(fields, indent=2, sort_keys=True)

    @property
    def all_linear(self) -> bool:
        """Whether the targets are "all-linear": PEFT selects modules by their class."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def selects(self, name: str) -> bool:
        """Returns whether PEFT adapts the module of the given name.

        Example:
          >>> PeftConfig(8, 16, ["q_proj"]).selects("model.layers.0.self_attn.q_proj")
          True
        """
        targets, excluded = self._patterns
        if _matches(excluded, name) or self.saves(name) or not _matches(targets, name):
            return False
        named_in_full = not isinstance(targets, str) and name in targets
        if named_in_full or not self.layers_to_transform:
            return True
        return self._number(name) in self.layers_to_transform

    def may_select(self, name: str) -> bool:
        """Returns whether PEFT's releases differ on the layer number of a module.

        Of several numbers in a name, PEFT 0.17 took the last one, and none at the very start.
        """
        numbers = re.findall(r"\.\d+(?=\.)", name)
        ambiguous = len(numbers) > 1 or re.match(r"[^.]*\.\d+\.", name)
        return bool(self.layers_to_transform and ambiguous)

    def saves(self, name: str) -> bool:
        """Returns whether PEFT saves the module of the given name, or one that it is in, whole."""
        patterns = (rf"(^|.*\.){m}($|\..*)" for m in self.modules_to_save)
        return any(matcher("modules_to_save", pattern).ends(name) for pattern in patterns)

    def may_save(self, name: str) -> bool:
        """Returns whether a module's name ends in an entry of `modules_to_save`.

        PEFT saves such a module whole even if the entry is only the end of a word: `norm` matches
        `input_layernorm`.
        """
        ancestors = [name[: m.start()] for m in re.finditer(r"\.", name)] + [name]
        return any(a.endswith(m) for a in ancestors for m in self.modules_to_save)

    def rank(self, name: str) -> int:
        """Returns the rank of a layer's adapter."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """Returns the numerator of a layer's scaling."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    @functools.cached_property
    def _patterns(self) -> tuple[str | frozenset[str], str | frozenset[str]]:
        targets, excluded = (
            field if isinstance(field, str) else frozenset(field)
            for field in (self.target_modules, self.exclude_modules)
        )
        return targets, excluded

    def _number(self, name: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            start = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
            ends = matcher("layers_pattern", rf"{start}{pattern}\.(?=\d+\.)").ends(name)
            if ends and (number := re.match(r"\d{1,18}(?=\.)", name[min(ends) :])):
                return int(number[0])
        return None


def _matches(patterns: str | Set[str], name: str) -> bool:
    """Returns whether a name matches a regular expression, or ends in one of several names."""
    if isinstance(patterns, str):
        return matcher("target_modules or exclude_modules", patterns).fullmatch(name)
    parts = name.split(".")
    return any(".".join(parts[i:]) in patterns for i in range(len(parts)))


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    matching = (value for pattern, value in patterns.items() if pattern_matches(pattern, name))
    return next(matching, default)
