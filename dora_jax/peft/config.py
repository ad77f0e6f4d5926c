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

from dora_jax.config import pattern_matches
from dora_jax.errors import DoRAError
from dora_jax.validation import is_index, is_number

FILE = "adapter_config.json"
# Values of `init_lora_weights` that leave the base's weights as they are.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
# Prefixes of the values that replace them, so that the adapter is of another base.
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Fields that do not change what a trained adapter computes.
_IGNORED = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}

# Fields that must be off, and what each one turns on.
_REFUSED = {
    "lora_bias": "a bias in lora_B",
    "use_qalora": "QALoRA, which pools the inputs of lora_A",
    "layer_replication": "layers that are repeated, so that the base has another depth",
    "megatron_config": "Megatron's parallel layers",
    "trainable_token_indices": "trained rows of the embedding",
    "target_parameters": "adapters of parameters that are not a layer's weight",
    "ensure_weight_tying": "adapters tied between layers",
    "alora_invocation_tokens": "activated LoRA, which adapts some tokens only",
    "arrow_config": "Arrow's routing between adapters",
    "kasa_config": "KaSA, which truncates the base's weights",
    "monteclora_config": "MonteCLoRA's sampled weights",
    "use_bdlora": "block-diagonal factors",
    "velora_config": "VeLoRA's compressed activations",
}


class PeftError(DoRAError):
    """A PEFT adapter that cannot be read, or an adapter that PEFT cannot represent."""


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
            fields = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise PeftError(f"{FILE} is not valid JSON: {error}. Fetch it again") from error
        if not isinstance(fields, dict):
            raise PeftError(f"{FILE} must hold a JSON object, got {type(fields).__name__}")
        _refuse(fields)
        own = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in fields.items() if name in own}
        for name in ("r", "lora_alpha", "target_modules"):
            if values.get(name) in (None, [], ""):
                raise PeftError(f"{FILE} has no {name}; fetch it again")
        # PEFT writes null for a field that is not set, and takes "" for null in layers_pattern.
        return cls(**{k: _checked(k, v) for k, v in values.items() if v not in (None, "")})

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
        return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save)

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
            if match := re.match(rf"{start}{pattern}\.(\d+)\.", name):
                return int(match[1])
        return None


def _refuse(fields: Mapping[str, Any]) -> None:
    """Raises `PeftError` if a field asks for something that is not implemented."""
    if (kind := fields.get("peft_type")) != "LORA":
        raise PeftError(f"peft_type is {kind!r}; only 'LORA' (with or without DoRA) is read")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise PeftError(
            f"init_lora_weights={init!r} replaced weights of the base, so the adapter does not fit "
            "the pretrained one. Save it anew with PEFT: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER); a LoftQ base has to be "
            "merged there"
        )
    if init not in _PLAIN_INITS:
        raise PeftError(
            f"init_lora_weights={init!r} is not known; the values that do not change the base are "
            f"{list(_PLAIN_INITS)}"
        )
    if (bias := fields.get("bias", "none")) != "none":
        raise PeftError(
            f"bias={bias!r}: trained biases are not read. Merge the adapter in PEFT "
            "(merge_and_unload) and read the merged checkpoint"
        )
    for name, meaning in _REFUSED.items():
        if fields.get(name) not in (None, False, [], {}):
            raise PeftError(
                f"{name} is set: {meaning}, which is not implemented. Merge the adapter in PEFT "
                "(merge_and_unload) and read the merged checkpoint"
            )
    known = {field.name for field in dataclasses.fields(PeftConfig)}
    known |= {*_IGNORED, *_REFUSED, "peft_type", "init_lora_weights", "bias"}
    for name in sorted(set(fields) - known):
        if fields[name] not in (None, False, [], {}):
            raise PeftError(
                f"{name}={fields[name]!r} in {FILE} is not known. If it does not change what the "
                "adapter computes, delete it there"
            )


def _checked(name: str, value: Any) -> Any:
    """Returns a field's value as `PeftConfig` holds it, after a check of its type and range."""
    fits = True
    if name == "r":
        fits = is_index(value) and value > 0
    elif name in ("lora_alpha", "lora_dropout"):
        fits = is_number(value) and (value > 0 if name == "lora_alpha" else 0 <= value < 1)
    elif name in ("use_dora", "use_rslora", "fan_in_fan_out", "inference_mode"):
        fits = isinstance(value, bool)
    elif name in ("rank_pattern", "alpha_pattern"):
        fits = isinstance(value, dict) and all(
            (is_index(v) if name == "rank_pattern" else is_number(v)) and v > 0
            for v in value.values()
        )
    elif name in ("base_model_name_or_path", "task_type"):
        fits = isinstance(value, str)
    elif name == "layers_to_transform":
        value = [value] if is_index(value) else value
        fits = isinstance(value, list) and all(is_index(i) for i in value)
    else:
        if isinstance(value, str) and name in ("layers_pattern", "modules_to_save"):
            value = [value]
        fits = isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        )
    if not fits:
        raise PeftError(f"{name} in {FILE} has an invalid value, {value!r}: fetch the file again")
    for pattern in value if name.endswith("_pattern") else ():
        _check_regex(name, pattern)
    if isinstance(value, str) and name in ("target_modules", "exclude_modules"):
        _check_regex(name, value)
    return tuple(value) if isinstance(value, list) else value


def _matches(patterns: str | Set[str], name: str) -> bool:
    """Returns whether a name matches a regular expression, or ends in one of several names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    parts = name.split(".")
    return any(".".join(parts[i:]) in patterns for i in range(len(parts)))


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    matching = (value for pattern, value in patterns.items() if pattern_matches(pattern, name))
    return next(matching, default)


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise PeftError(
            f"{field} in {FILE}: {pattern!r} is not a regular expression: {error}"
        ) from error


def _no_constant(name: str) -> Any:
    raise PeftError(f"{FILE} holds {name}, which is not a number: fetch it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise PeftError(f"{FILE} has a field twice: {[name for name, _ in pairs]}. Delete one")
    return fields
