"""Reads and writes the Hugging Face checkpoint folders of BERT, RoBERTa and LLaMA-like models.

A folder holds `config.json` and safetensors, in one file or in several. Pickles are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dora_jax import huggingface
from dora_jax.names import BERT, LLAMA
from experiments.models.bert import BertEncoder
from experiments.models.bert_config import BertConfig
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig

if TYPE_CHECKING:
    import os

    from jax.typing import DTypeLike

CheckpointError = huggingface.CheckpointError

BERT_UNUSED = {
    r"pooler\..*": "the pooler; pooling here takes hidden states as they are",
    r"cls\..*": "BERT's pretraining heads",
    r"lm_head\..*": "RoBERTa's masked language modelling head",
    r"classifier\..*": "the head of a fine-tuned model",
    r"qa_outputs\..*": "the head of a fine-tuned model",
    r"embeddings\.(position|token_type)_ids": "a constant, computed here",
}
"""Tensors of a checkpoint that the encoder does not use: a regular expression, and the reason."""

LLAMA_UNUSED = {r".*\.rotary_emb\.inv_freq": "a constant, computed here"}
"""The same for the decoder."""

_LAYER_NUMBER = re.compile(r"\blayers?\.(\d{1,9})\.")
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_bert(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    dropout_rate: float | None = None,
    rngs: nnx.Rngs | None = None,
) -> BertEncoder:
    """Reads a pretrained encoder from a checkpoint with any head, or with none.

    Example::

        encoder = load_bert("roberta-base", dtype=jnp.bfloat16, rngs=nnx.Rngs(dropout=0))
        hidden = encoder(input_ids, attention_mask)

    Args:
        folder: Holds `config.json` and the weights, of any float dtype.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters. The stored tensors are cast to it.
        dropout_rate: Replaces both dropout rates of `config.json`.
        rngs: Stream `dropout`. It is needed to run with dropout (`encoder.train()`).

    Returns:
        The encoder, without dropout until `encoder.train()` is called.

    Raises:
        MissingFileError: The folder or one of its files is missing.
        ModelConfigError: `config.json` is incomplete, or names a variant that is not implemented.
        CheckpointError: The weights are pickled or truncated, or some tensors are missing, unknown,
            of another shape, or not finite. The message names all of them.
    """
    folder = _folder(folder)
    config = BertConfig.from_json(folder / "config.json")
    _check_sizes(folder, config, "max_position_embeddings", "type_vocab_size")
    if dropout_rate is not None:
        config = dataclasses.replace(
            config, hidden_dropout_prob=dropout_rate, attention_probs_dropout_prob=dropout_rate
        )
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    encoder = _abstract(BertEncoder, config, **dtypes)
    rules = huggingface.TensorRules(rename=_bert_name, unused=BERT_UNUSED)
    encoder = huggingface.load_checkpoint(folder, encoder, BERT, rules=rules)
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
    """Writes an encoder as a checkpoint folder for `load_bert`; replaces weights in the folder.

    Args:
        encoder: The encoder, with plain layers. Merge adapters first.
        folder: Where to write the configuration, the weights and the tokenizer.
        source: The folder of the pretrained encoder; its configuration and tokenizer are copied.
        head: A classification head, written as `classifier.weight` and `classifier.bias`.
    """
    extra: dict[str, Any] = {}
    if head is not None:
        extra["classifier.weight"] = np.asarray(head.kernel[...]).T
        if head.bias is not None:
            extra["classifier.bias"] = np.asarray(head.bias[...])
    options = huggingface.SaveOptions(overwrite=True)
    huggingface.save_checkpoint(folder, encoder, BERT, source=source, extra=extra, options=options)


def load_llama(
    folder: str | os.PathLike[str],
    *,
    scan_layers: bool = False,
    remat: Any = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    shardings: Any = None,
    progress: bool | None = None,
) -> Llama:
    """Reads a pretrained decoder: LLaMA 1 to 3, SmolLM2, Mistral, Qwen2 or Qwen3.

    Example::

        model = load_llama("Llama-2-7b-hf", scan_layers=True, param_dtype=jnp.bfloat16)
        logits = model(input_ids, attention_mask)

    Args:
        folder: Holds `config.json` and the weights, of any float dtype.
        scan_layers: Whether the layers are stacked, see `Llama`.
        remat: Whether activations are recomputed, see `Llama`.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters. The stored tensors are cast to it.
        shardings: Shardings of the parameters, see `dora_jax.huggingface.load_checkpoint`.
        progress: Whether to show a progress bar. The default is to show it above 1 GB.

    Raises:
        MissingFileError, ModelConfigError, CheckpointError: As for `load_bert`.
    """
    folder = _folder(folder)
    config = LlamaConfig.from_json(folder / "config.json")
    _check_sizes(folder, config)
    switches: dict[str, Any] = {"scan_layers": scan_layers, "remat": remat}
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    model = _abstract(Llama, config, **switches, **dtypes)
    tied = {_LM_HEAD: _EMBEDDING} if config.tie_word_embeddings else {}
    rules = huggingface.TensorRules(rename=_llama_name, unused=LLAMA_UNUSED, tied=tied)
    return huggingface.load_checkpoint(
        folder, model, LLAMA, rules=rules, shardings=shardings, progress=progress
    )


def save_llama(
    model: Llama,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 2 * 10**9,
) -> None:
    """Writes a decoder as a checkpoint folder for `load_llama` and transformers.

    Weights in the folder are replaced.

    Args:
        model: The decoder, with plain layers. Merge adapters first.
        folder: Where to write the configuration, the weights and the tokenizer.
        source: The folder of the pretrained decoder; its configuration and tokenizer are copied.
        dtype: Dtype of the tensors. The default is the dtype of the parameters.
        max_file_bytes: The largest size of a file. Larger models are written as several files.
    """
    options = huggingface.SaveOptions(dtype, max_file_bytes, overwrite=True)
    huggingface.save_checkpoint(folder, model, LLAMA, source=source, options=options)


@functools.lru_cache(maxsize=4)
def _abstract(model: Any, config: BertConfig | LlamaConfig, **options: Any) -> Any:
    """Returns the shapes of a model: random initial values would be replaced.

    The result is not changed, so that it serves whoever reads several folders of one kind.
    """
    return nnx.eval_shape(lambda: model(config, **options, rngs=nnx.Rngs(0)))


def _folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(folder)
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        is_folder = False
    if not is_folder:
        raise huggingface.MissingFileError(
            f"{str(folder)[:300]!r} is not a folder: give a Hugging Face checkpoint folder."
        )
    return folder


def _check_sizes(folder: pathlib.Path, config: BertConfig | LlamaConfig, *others: str) -> None:
    """Compares a configuration with the weights, before a model of its sizes is made.

    Reading the weights compares every shape. But a configuration with a billion features, or with
    10,000 layers, would take minutes and all memory until then.

    Args:
        folder: Holds the weights.
        config: The configuration.
        others: Fields that are axes of some tensor, besides those of every configuration.

    Raises:
        CheckpointError: A field is far from all tensors.
    """
    stored = huggingface.open_folder(folder)
    names = stored.tensors.keys() | stored.unreadable
    numbers = {int(number) for name in names for number in _LAYER_NUMBER.findall(name)}
    layers = len(numbers)
    if config.num_hidden_layers > layers and not stored.problems:
        raise CheckpointError(
            f"{stored.weights} holds {layers} layers, but num_hidden_layers is "
            f"{config.num_hidden_layers} in {folder / 'config.json'}. Correct it, or fetch the "
            "weights again."
        )
    largest = max((n for tensor in stored.tensors.values() for n in tensor.shape), default=0)
    sizes = {
        name: getattr(config, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", *others)
    }
    if isinstance(config, LlamaConfig):
        sizes["num_attention_heads * head_dim"] = config.num_attention_heads * config.head_size
    for name, size in sizes.items():
        if size > 4 * largest:
            raise CheckpointError(
                f"{name} is {size} in {folder / 'config.json'}, but no tensor in {stored.weights} "
                f"has an axis of more than {largest}. Correct it, or fetch the weights again."
            )


def _bert_name(key: str) -> str:
    """Returns a stored name without the prefix of a head and with current parameter names."""
    key = re.sub(r"^(bert|roberta)\.", "", key)
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: f"LayerNorm.{'weight' if match[1] == 'gamma' else 'bias'}",
        key,
    )


def _llama_name(key: str) -> str:
    """Returns a stored name with its prefix, which is absent if the head was not saved."""
    return key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
