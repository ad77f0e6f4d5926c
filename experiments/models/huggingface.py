"""Reads Hugging Face checkpoints of BERT and RoBERTa into a :class:`BertEncoder`.

Reads ``config.json`` and ``model.safetensors`` of a checkpoint folder, whichever head the encoder
was saved under. Pickled checkpoints are refused.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.models.bert import BertConfig, BertEncoder

if TYPE_CHECKING:
    import os

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

logger = logging.getLogger(__name__)

MODULE_NAMES = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.layer_norm": "embeddings.LayerNorm",
    "layers.{i}.attention.query": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.attention.key": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.attention.value": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.attention.output": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention.layer_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.intermediate": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.output": "encoder.layer.{i}.output.dense",
    "layers.{i}.layer_norm": "encoder.layer.{i}.output.LayerNorm",
}
"""Module paths of :class:`BertEncoder`, and Hugging Face's for the same modules."""

PARAMETER_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
"""Parameters of Flax layers, and torch's names. A kernel is (in, out), its weight (out, in)."""

PREFIXES = ("bert.", "roberta.")
"""What stands before the encoder's names in a checkpoint saved under a head."""

NOT_USED = {
    "pooler.": "the pooler; pooling here takes hidden states as they are",
    "cls.": "BERT's pretraining heads",
    "lm_head.": "RoBERTa's masked language modelling head",
    "classifier.": "the head of a fine-tuned model",
    "qa_outputs.": "the head of a fine-tuned model",
    "embeddings.position_ids": "a constant, computed here",
    "embeddings.token_type_ids": "a constant, computed here",
}
"""Tensors that a checkpoint may hold and the encoder does without: first part of the name, why."""

_OLD_PARAMETER_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold the encoder that its config describes."""


def module_names(config: BertConfig) -> dict[str, str]:
    """Maps every module path of the encoder to Hugging Face's, without prefix.

    Example:
        >>> module_names(BertConfig(num_hidden_layers=2))["layers.1.output"]
        'encoder.layer.1.output.dense'
    """
    return {
        ours.format(i=i): theirs.format(i=i)
        for ours, theirs in MODULE_NAMES.items()
        for i in range(config.num_hidden_layers if "{i}" in ours else 1)
    }


def load_bert(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    dropout_rate: float | None = None,
    rngs: nnx.Rngs | None = None,
) -> BertEncoder:
    """Reads a pretrained encoder from a Hugging Face checkpoint folder.

    Example::

        encoder = load_bert("roberta-base", dtype=jnp.bfloat16, rngs=nnx.Rngs(dropout=0))
        hidden = encoder(input_ids, attention_mask)

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` (any float dtype).
        dtype: compute dtype.
        param_dtype: dtype of the parameters, to which the stored tensors are cast.
        dropout_rate: replaces both dropout rates of ``config.json``.
        rngs: stream ``dropout``, needed to run with dropout on (``encoder.train()``).

    Returns:
        The encoder, dropout off.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        BertConfigError: ``config.json`` is incomplete or asks for what is not implemented.
        CheckpointError: the weights are pickled, sharded or truncated; or tensors are missing, not
            known, of another shape, or not finite: all of them are named at once.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a Hugging Face checkpoint folder.")
    config = BertConfig.from_json(folder / "config.json")
    if dropout_rate is not None:
        config = dataclasses.replace(
            config, hidden_dropout_prob=dropout_rate, attention_probs_dropout_prob=dropout_rate
        )
    # Shapes only: nothing is initialised at random to be thrown away.
    encoder = nnx.eval_shape(
        lambda: BertEncoder(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    parameters = _read_parameters(_weights_file(folder), encoder)
    nnx.update(encoder, nnx.from_flat_state(parameters.items()))
    for _, module in nnx.iter_graph(encoder):
        if isinstance(module, nnx.Dropout):
            module.rngs = None if rngs is None else rngs.dropout.fork()
    return encoder


def save_bert(
    encoder: BertEncoder,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    head: nnx.Linear | None = None,
) -> None:
    """Writes an encoder as a Hugging Face checkpoint folder, which :func:`load_bert` reads.

    Args:
        encoder: the encoder, with plain layers (merge adapters first).
        folder: where to write ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
        source: the folder the encoder was read from, for its configuration and tokenizer.
        head: a classification head, written as ``classifier.weight`` and ``classifier.bias``.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = module_names(encoder.config)
    parameters = {
        _torch_name(path, modules): (path, variable)
        for path, variable in nnx.to_flat_state(nnx.state(encoder, nnx.Param))
    }
    if head is not None:
        for path, variable in nnx.to_flat_state(nnx.state(head, nnx.Param)):
            parameters[f"classifier.{PARAMETER_NAMES[str(path[-1])]}"] = (path, variable)
    tensors = {
        name: np.ascontiguousarray(np.asarray(value[...]).T if path[-1] == "kernel" else value[...])
        for name, (path, value) in parameters.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The folder's safetensors file, or an error that says what stands in its place."""
    file = folder / "model.safetensors"
    if file.is_file():
        return file
    save_again = (
        "save it again where transformers is installed: "
        "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER, max_shard_size='100GB')."
    )
    if (folder / "model.safetensors.index.json").is_file():
        raise CheckpointError(f"{folder} is sharded, and only one file is read: {save_again}")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise CheckpointError(
            f"{folder} holds {pickled[0]} but no model.safetensors. A .bin file is a pickle, which "
            f"can run any code when it is read, so it is refused. If you trust it, {save_again}"
        )
    raise FileNotFoundError(f"{file} is missing: fetch it, or {save_again}")


def _read_parameters(
    file: pathlib.Path, encoder: BertEncoder
) -> dict[tuple[Any, ...], nnx.Param[Float[Array, "..."]]]:
    """Reads every parameter of an encoder of shapes, by path, or names all that is wrong."""
    wanted = dict(nnx.to_flat_state(nnx.state(encoder, nnx.Param)))
    modules = module_names(encoder.config)
    names = {path: _torch_name(path, modules) for path in wanted}
    try:
        with safe_open(file, framework="numpy") as stored:
            keys, problems = _match(stored, set(names.values()))
            parameters = {}
            for path, shape in wanted.items():
                if key := keys.get(names[path]):
                    try:
                        value = _read_one(stored, key, path[-1] == "kernel", shape)
                    except CheckpointError as error:
                        problems.append(f"{key}: {error}")
                    else:
                        parameters[path] = shape.replace(value)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({error}). Fetch it again."
        ) from error
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"{file} is not the {encoder.config.model_type} encoder that config.json beside it "
            f"describes:\n  {listing}"
        )
    return parameters


def _torch_name(path: tuple[Any, ...], modules: dict[str, str]) -> str:
    *module, parameter = path
    return f"{modules['.'.join(map(str, module))]}.{PARAMETER_NAMES[parameter]}"


def _plain_name(key: str) -> str:
    """A stored key without the prefix of a head, and with today's names for its parameters."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    for old, new in _OLD_PARAMETER_NAMES.items():
        if key.endswith(old):
            key = key.removesuffix(old) + new
    return key


def _match(stored: Any, wanted: set[str]) -> tuple[dict[str, str], list[str]]:
    """Finds the stored key of every wanted name.

    Returns:
        The keys by name, and a line for every name without a key and every key without a use.
    """
    keys: dict[str, str] = {}
    problems = []
    for key in stored.keys():  # noqa: SIM118 - not a dict: it cannot be iterated over itself
        name = _plain_name(key)
        if name in keys:
            problems.append(f"{key}: holds the same parameter as {keys[name]}. Delete one of them.")
        elif name in wanted:
            keys[name] = key
        elif why := next((why for part, why in NOT_USED.items() if name.startswith(part)), None):
            logger.info("%s is not used: %s", key, why)
        else:
            problems.append(
                f"{key}: not part of the encoder. Correct config.json (the number of layers?), or "
                "delete the tensor if it belongs to a head."
            )
    problems += [
        f"{name}: missing. Fetch the file again, or correct config.json (the number of layers?)."
        for name in sorted(wanted - keys.keys())
    ]
    return keys, problems


def _read_one(
    stored: Any, key: str, is_kernel: bool, wanted: nnx.Param[Any]
) -> Float[Array, "..."]:
    """Reads one tensor as the parameter it becomes."""
    tensor = stored.get_tensor(key)
    if is_kernel:
        tensor = tensor.T
    if tensor.shape != wanted.shape:
        expected = wanted.shape[::-1] if is_kernel else wanted.shape
        raise CheckpointError(
            f"shape {tuple(stored.get_slice(key).get_shape())}, but config.json makes it "
            f"{tuple(expected)}. Correct the sizes in config.json."
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise CheckpointError(
            f"dtype {tensor.dtype}; only floating point is read. Save the model unquantised."
        )
    value = tensor.astype(wanted.dtype)
    if not np.isfinite(value).all():
        raise CheckpointError(
            f"NaN or infinity as {value.dtype}. Fetch the file again, or take a wider param_dtype."
        )
    return jnp.asarray(value)
