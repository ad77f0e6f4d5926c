"""Hugging Face checkpoint folders of the experiments' models: BERT, RoBERTa, LLaMA and its kin.

A folder holds `config.json` and safetensors, in one file or in several; pickles are refused.
"""

from __future__ import annotations

import dataclasses
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
"""Tensors that a checkpoint may hold and the encoder does without: a regular expression, why."""

LLAMA_UNUSED = {r".*\.rotary_emb\.inv_freq": "a constant, computed here"}
"""The same for the decoder."""

_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_bert(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    dropout_rate: float | None = None,
    rngs: nnx.Rngs | None = None,
) -> BertEncoder:
    """Reads a pretrained encoder, whichever head it was saved under.

    Example::

        encoder = load_bert("roberta-base", dtype=jnp.bfloat16, rngs=nnx.Rngs(dropout=0))
        hidden = encoder(input_ids, attention_mask)

    Args:
        folder: holds ``config.json`` and the weights (any float dtype).
        dtype: compute dtype.
        param_dtype: dtype of the parameters, to which the stored tensors are cast.
        dropout_rate: replaces both dropout rates of ``config.json``.
        rngs: stream ``dropout``, needed to run with dropout on (``encoder.train()``).

    Returns:
        The encoder, dropout off.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        BertConfigError: ``config.json`` is incomplete or asks for what is not implemented.
        CheckpointError: the weights are pickled or truncated; or tensors are missing, not known, of
            another shape, or not finite: all of them are named at once.
    """
    folder = _folder(folder)
    config = BertConfig.from_json(folder / "config.json")
    if dropout_rate is not None:
        config = dataclasses.replace(
            config, hidden_dropout_prob=dropout_rate, attention_probs_dropout_prob=dropout_rate
        )
    # Shapes only: nothing is initialised at random to be thrown away.
    encoder = nnx.eval_shape(
        lambda: BertEncoder(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    encoder = huggingface.load_checkpoint(
        folder, encoder, BERT, rename=_bert_name, unused=BERT_UNUSED
    )
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
    """Writes an encoder as a checkpoint folder, which :func:`load_bert` reads.

    Weights that are there already are replaced.

    Args:
        encoder: the encoder, with plain layers (merge adapters first).
        folder: where to write the configuration, the weights and the tokenizer.
        source: the folder the encoder was read from, for its configuration and tokenizer.
        head: a classification head, written as ``classifier.weight`` and ``classifier.bias``.
    """
    extra: dict[str, Any] = {}
    if head is not None:
        extra["classifier.weight"] = np.asarray(head.kernel[...]).T
        if head.bias is not None:
            extra["classifier.bias"] = np.asarray(head.bias[...])
    huggingface.save_checkpoint(folder, encoder, BERT, source=source, extra=extra, overwrite=True)


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
        folder: holds ``config.json`` and the weights (any float dtype).
        scan_layers: whether the layers are stacked, see :class:`Llama`.
        remat: see :class:`Llama`.
        dtype: compute dtype.
        param_dtype: dtype of the parameters, to which the stored tensors are cast.
        shardings: where the parameters are to be, see :func:`dora_jax.huggingface.load_checkpoint`.
        progress: whether to show a bar; by default where there is more than 1 GB to read.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        LlamaConfigError: ``config.json`` is incomplete or asks for what is not implemented.
        CheckpointError: as for :func:`load_bert`.
    """
    folder = _folder(folder)
    config = LlamaConfig.from_json(folder / "config.json")
    model = nnx.eval_shape(
        lambda: Llama(
            config,
            scan_layers=scan_layers,
            remat=remat,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        )
    )
    return huggingface.load_checkpoint(
        folder,
        model,
        LLAMA,
        shardings=shardings,
        rename=_llama_name,
        unused=LLAMA_UNUSED,
        tied={_LM_HEAD: _EMBEDDING} if config.tie_word_embeddings else None,
        progress=progress,
    )


def save_llama(
    model: Llama,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    max_file_bytes: int = 2 * 10**9,
) -> None:
    """Writes a decoder as a checkpoint folder, which :func:`load_llama` and transformers read.

    Weights that are there already are replaced.

    Args:
        model: the decoder, with plain layers (merge adapters first).
        folder: where to write the configuration, the weights and the tokenizer.
        source: the folder the decoder was read from, for its configuration and tokenizer.
        dtype: of the tensors; by default the parameters' own.
        max_file_bytes: more are written as several files.
    """
    huggingface.save_checkpoint(
        folder,
        model,
        LLAMA,
        source=source,
        dtype=dtype,
        max_file_bytes=max_file_bytes,
        overwrite=True,
    )


def _folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a Hugging Face checkpoint folder.")
    return folder


def _bert_name(key: str) -> str:
    """A stored name without the prefix of a head, and with today's names for its parameters."""
    key = re.sub(r"^(bert|roberta)\.", "", key)
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: f"LayerNorm.{'weight' if match[1] == 'gamma' else 'bias'}",
        key,
    )


def _llama_name(key: str) -> str:
    """A stored name with the prefix that a model saved without its head lacks."""
    return key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
