"""Transformers' Flax models, tiny and at random; no hub is asked."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D
from transformers.models.t5 import modeling_flax_t5

import dora_jax as dora
from tests.foreign.harness import CONFIG, LinenCase

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
IDS = jax.random.randint(jax.random.key(4), (2, 6), 3, 40)
MASK = jnp.ones_like(IDS).at[1, 4:].set(0)
POSITIONS = jnp.broadcast_to(jnp.arange(6), IDS.shape)

# GPT-2's own layer stores its kernel as (out, in).
dora.layers.register_layout(
    FlaxConv1D, dora.layers.einsum_layout(lambda layer, call: "...i,oi->...o")
)
CONV1D = dora.decomposition.KernelAxes((), (1,), (0,))


def _clip(x, min=None, max=None, *, a_max=None):
    """`jnp.clip` with an argument that JAX has dropped and Transformers' T5 still passes."""
    return jnp.clip(x, min, max if a_max is None else a_max)


modeling_flax_t5.jnp = types.SimpleNamespace(**{**vars(jnp), "clip": _clip})


def roberta() -> LinenCase:
    """Blocks under `nn.remat`, dropout in the adapters, a new head trained in full."""
    config = transformers.RobertaConfig(**SIZES, num_labels=3, pad_token_id=1)
    model = transformers.FlaxRobertaForSequenceClassification(
        config, _do_init=False, gradient_checkpointing=True
    )
    return LinenCase(
        model.module,
        (IDS, MASK, jnp.zeros_like(IDS), POSITIONS + 2, jnp.ones((2, 2))),
        dora.DoRAConfig(rank=2, alpha=4.0, dropout=0.1, modules_to_save=["classifier"]),
        output=lambda output: output.logits,
    )


def llama() -> LinenCase:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    model = transformers.FlaxLlamaForCausalLM(config, _do_init=False)
    return LinenCase(model.module, (IDS, MASK, POSITIONS), output=lambda output: output.logits)


def gpt2(config: dora.DoRAConfig = CONFIG) -> LinenCase:
    """Tied: its head is run on the table of `wte`, so it has no kernel of its own to adapt."""
    sizes = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model = transformers.FlaxGPT2LMHeadModel(sizes, _do_init=False)
    return LinenCase(
        model.module,
        (IDS, MASK, POSITIONS),
        config,
        output=lambda output: output.logits,
        axes={name: CONV1D for name in ("c_attn", "c_proj", "c_fc")},
    )


def t5() -> LinenCase:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    model = transformers.FlaxT5ForConditionalGeneration(config, _do_init=False)
    return LinenCase(model.module, (IDS, MASK, IDS, MASK), output=lambda output: output.logits)


def vit() -> LinenCase:
    """By suffixes; the first names the convolution that embeds the patches."""
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    model = transformers.FlaxViTForImageClassification(config, _do_init=False)
    names = ["patch_embeddings.projection", "query", "value", "output.dense", "classifier"]
    return LinenCase(
        model.module,
        (jax.random.normal(jax.random.key(5), (2, 8, 8, 3)),),
        dora.DoRAConfig(rank=2, alpha=4.0, target_modules=names),
        output=lambda output: output.logits,
        axes={"projection": dora.decomposition.KernelAxes((), (0, 1, 2), (3,))},
    )


CASES = {
    "transformers FlaxRoberta": roberta,
    "transformers FlaxLlama": llama,
    "transformers FlaxGPT2": gpt2,
    "transformers FlaxT5": t5,
    "transformers FlaxViT": vit,
}
