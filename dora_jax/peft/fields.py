"""The fields of `adapter_config.json` that are known, what they may hold, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dora_jax.disk.json_file import LONGEST_NAME
from dora_jax.errors import ConfigError, DoRAError
from dora_jax.patterns import LONGEST, Pattern, compiled
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
    # PEFT 0.1: whether weights are merged while no gradient is needed.
    "merge_weights",
    # ms-swift: dtypes and learning rates of training.
    "lora_dtype",
    "lora_lr_ratio",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "swift_type",
    # unsloth, and what other writers copy from the model's configuration.
    "unsloth_fixed",
    "unsloth_version",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "library_name",
    "_name_or_path",
    "_commit_hash",
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


# Fields of adapters that mlx-lm wrote, which have no peft_type.
_MLX = {"fine_tune_type", "lora_parameters", "lora_layers"}


class PeftError(DoRAError):
    """A PEFT adapter that cannot be read, or an adapter that PEFT cannot represent."""


def refuse(fields: Mapping[str, Any], own: Collection[str]) -> None:
    """Raises `PeftError` if a field asks for something that is not implemented.

    Args:
      fields: the JSON object in the file.
      own: the names of the fields that `PeftConfig` has.
    """
    if "peft_type" not in fields and (mlx := sorted(_MLX & fields.keys())):
        raise PeftError(
            f"{FILE} is of an adapter of MLX ({mlx[0]}), which has another format: fuse it there "
            "(mlx_lm.fuse) and read the fused checkpoint"
        )
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
    if not isinstance(init, bool | str) or init not in _PLAIN_INITS:
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
    known = {*own, *_IGNORED, *_REFUSED, "peft_type", "init_lora_weights", "bias"}
    for name in sorted(set(fields) - known):
        if fields[name] not in (None, False, [], {}):
            raise PeftError(
                f"{name}={fields[name]!r} in {FILE} is not known. If it does not change what the "
                "adapter computes, delete it there"
            )


def checked(name: str, value: Any) -> Any:
    """Returns a field's value as `PeftConfig` holds it, after a check of its type and range."""
    fits = True
    if name == "r":
        fits = is_index(value) and 0 < value < 2**31
    elif name in ("lora_alpha", "lora_dropout"):
        fits = is_number(value) and (value > 0 if name == "lora_alpha" else 0 <= value < 1)
    elif name in ("use_dora", "use_rslora", "fan_in_fan_out", "inference_mode"):
        fits = isinstance(value, bool)
    elif name in ("rank_pattern", "alpha_pattern"):
        fits = isinstance(value, dict) and all(
            (is_index(v) if name == "rank_pattern" else is_number(v)) and v > 0
            for v in value.values()
        )
        fits = fits and sum(map(len, value)) <= LONGEST
    elif name in ("base_model_name_or_path", "task_type"):
        fits = isinstance(value, str)
    elif name == "layers_to_transform":
        value = [value] if is_index(value) else value
        fits = isinstance(value, list) and all(is_index(i) for i in value)
    else:
        if isinstance(value, str) and name in ("layers_pattern", "modules_to_save"):
            value = [value]
        fits = isinstance(value, str) or (
            isinstance(value, list)
            and all(isinstance(v, str) and 0 < len(v) <= LONGEST_NAME for v in value)
        )
    if not fits:
        raise PeftError(
            f"{name} in {FILE} has an invalid value, {value!r:.200}: fetch the file again"
        )
    if name in ("rank_pattern", "alpha_pattern"):
        for pattern in value:
            matcher(name, pattern)
    if isinstance(value, str) and name in ("target_modules", "exclude_modules"):
        matcher(name, value)
    elif name in ("layers_pattern", "modules_to_save"):
        for pattern in value:
            matcher(name, pattern)
    return tuple(value) if isinstance(value, list) else value


def matcher(field: str, pattern: str) -> Pattern:
    """Returns the pattern in a field; raises `PeftError` if it is none, naming field and file."""
    try:
        return compiled(pattern, f"{field} in {FILE}")
    except ConfigError as error:
        raise PeftError(str(error)) from error


def no_constant(name: str) -> Any:
    """Raises `PeftError` for NaN and infinity, which are no JSON."""
    raise PeftError(f"{FILE} holds {name}, which is not a number: fetch it again")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of an object; raises `PeftError` if one is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise PeftError(f"{FILE} has a field twice: {[name for name, _ in pairs]}. Delete one")
    return fields
