"""The packaged pretrained language model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from experiments.models.huggingface import load_llama
from experiments.models.smollm import half_rotated

SENTENCE = (
    "The capital of France is Paris, which lies on the river Seine. It is one of the most visited "
    "cities in the world, known for its museums, food and architecture."
)


def nats_per_token(model, tokens):
    log_p = jax.nn.log_softmax(nnx.jit(lambda model, x: model(x))(model, tokens)[0, :-1])
    return float(-np.mean(np.asarray(log_p)[np.arange(len(tokens[0]) - 1), tokens[0, 1:]]))


@pytest.mark.full
def test_a_sentence_costs_two_nats_a_token_and_more_in_the_wrong_rotary_order(smollm2):
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    encoding = tokenizer.encode(SENTENCE)
    assert tokenizer.decode(encoding.ids) == SENTENCE
    tokens = np.array([encoding.ids])
    model = load_llama(smollm2, scan_layers=True)
    assert nats_per_token(model, tokens) == pytest.approx(2.00, abs=0.005)
    assert len({leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}) == 1
    for module in (model.layers.self_attn.q_proj, model.layers.self_attn.k_proj):
        kernel = module.kernel[...]
        heads = kernel.reshape(*kernel.shape[:2], -1, 2, 32).swapaxes(-1, -2)
        module.kernel[...] = heads.reshape(kernel.shape)  # as llama.cpp has them
    assert nats_per_token(model, tokens) == pytest.approx(2.80, abs=0.005)
    model.norm.scale[...] = jnp.zeros_like(model.norm.scale[...])
    assert nats_per_token(model, tokens) == pytest.approx(np.log(49152), abs=1e-4)


def test_the_order_of_pairs_is_that_of_the_rotary_embeddings():
    """Turning (2i, 2i + 1) before the reordering is turning (i, i + head_dim / 2) after it."""
    x, angle = np.random.default_rng(0).normal(size=(16, 3)), 0.3
    cos, sin = np.cos(angle), np.sin(angle)
    neighbours = x.reshape(2, 4, 2, 3)
    a, b = neighbours[:, :, 0], neighbours[:, :, 1]
    turned = np.stack([a * cos - b * sin, b * cos + a * sin], 2).reshape(16, 3)
    a, b = np.split(half_rotated(x, 8).reshape(2, 8, 3), 2, axis=1)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], 1).reshape(16, 3)
    np.testing.assert_allclose(half_rotated(turned, 8), expected)
