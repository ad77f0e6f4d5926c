"""Generation with cached keys and values equals calls on the whole text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from experiments.models.generation import Sampling, draw, generate, left_padded
from experiments.models.kv_cache import empty_cache
from experiments.models.llama import Llama
from tests.experiments.tiny_models import LLAMA, filled

QWEN3 = dataclasses.replace(LLAMA, model_type="qwen3", head_dim=8, tie_word_embeddings=True)
WINDOWED = dataclasses.replace(LLAMA, model_type="qwen2", sliding_window=3)
PROMPTS = [[5, 9, 30, 1, 7], [22, 6, 8]]
ADAPTED = dora.DoRAConfig(rank=2, target_modules=["q_proj", "v_proj", "down_proj"])


def trained(config, scan_layers=False):
    """An adapted model whose adapters are far from their start."""
    base = filled(lambda: Llama(config, scan_layers=scan_layers, rngs=nnx.Rngs(0)))
    model = dora.apply_dora(base, ADAPTED, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for variable in jax.tree.leaves(
        nnx.state(model, dora.DoRAParam), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        noise = rng.standard_normal(variable[...].shape)
        variable[...] = variable[...] * (1 + 0.2 * noise) + 0.1 * noise
    return model


@functools.cache
def forms(config=LLAMA, scan_layers=False):
    """One model as it is trained, with precomputed scales, and merged. None may be changed."""
    model = trained(config, scan_layers)
    return {
        "adapted": model,
        "precomputed": dora.precompute_scales(model),
        "merged": dora.merge(model),
    }


whole = nnx.jit(lambda model, tokens: model(tokens))


@nnx.jit
def by_steps(model, prompts, mask, rest):
    """The logits after the prompts, and after each of the further tokens, one at a time."""
    cache = empty_cache(model.config, len(prompts), prompts.shape[1] + rest.shape[1], "float32")
    hidden, cache = model.extend(prompts, cache, mask)
    graphdef, state = nnx.split(model)

    def step(cache, tokens):
        model = nnx.merge(graphdef, state, copy=True)
        hidden, cache = model.extend(tokens[:, None], cache)
        return cache, model.logits(hidden)[:, 0]

    _, found = jax.lax.scan(step, cache, rest.T)
    return jnp.concatenate([model.logits(hidden[:, -1:]), found.swapaxes(0, 1)], axis=1)


@pytest.mark.rows(2)
@pytest.mark.parametrize(
    ("config", "scan_layers", "form"),
    [
        (LLAMA, True, "adapted"),
        (WINDOWED, False, "precomputed"),
        (QWEN3, True, "merged"),
        (LLAMA, False, "adapted"),
        (LLAMA, True, "precomputed"),
        (WINDOWED, True, "adapted"),
    ],
)
def test_step_by_step_equals_a_call_on_the_whole_text(config, scan_layers, form):
    model = forms(config, scan_layers)[form]
    rest = np.array([[3, 17, 2, 31], [11, 4, 39, 25]])
    ids, mask = left_padded(PROMPTS)
    found = by_steps(model, ids, mask, rest)
    for row, prompt in enumerate(PROMPTS):
        # Padding after the text changes nothing before it, and keeps to one program.
        text = np.zeros((1, 9), int)
        text[0, : len(prompt) + 4] = [*prompt, *rest[row]]
        expected = whole(model, text)[0, len(prompt) - 1 : len(prompt) + 4]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


@functools.cache
def greedy_tokens():
    """What the adapted model continues with, by calls on the whole text."""
    rows = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(6):
            padded = np.array([text + [0] * (11 - len(text))])
            text.append(int(whole(forms()["adapted"], padded)[0, len(text) - 1].argmax()))
        rows.append(text[len(prompt) :])
    return rows


@pytest.mark.rows(1)
@pytest.mark.parametrize("form", ["adapted", "precomputed", "merged"])
def test_the_greedy_tokens_are_those_of_calls_on_the_whole_text(form):
    ids, mask = left_padded(PROMPTS, 7)  # more padding than needed
    generated = generate(forms()[form], ids, mask, max_new_tokens=6)
    assert generated.tokens.tolist() == greedy_tokens()
    assert generated.lengths.tolist() == [6, 6]


def test_a_row_ends_at_its_end_and_the_others_go_on():
    one, other = greedy_tokens()
    end = next(t for t in one[:-1] if t not in other)
    stop = one.index(end) + 1
    ids, mask = left_padded(PROMPTS, 7)
    generated = generate(forms()["merged"], ids, mask, max_new_tokens=6, end_ids=[end])
    assert generated.lengths.tolist() == [stop, 6]
    assert generated.tokens.tolist() == [one[:stop] + [0] * (6 - stop), other]


def test_draws_have_the_probabilities_of_the_kept_tokens():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    keys = jax.random.split(jax.random.key(1), 4000)

    def frequencies(sampling):
        one = jax.jit(jax.vmap(lambda key: draw(jnp.log(p)[None], sampling, key)[0]))
        return np.bincount(one(keys), minlength=4) / len(keys)

    def kept(p, count, power=1.0):
        q = np.where(np.arange(4) < count, p**power, 0)
        return q / q.sum()

    near = {"atol": 4 * np.sqrt(0.25 / len(keys))}
    np.testing.assert_allclose(frequencies(Sampling(1.0)), p, **near)
    np.testing.assert_allclose(frequencies(Sampling(0.5)), kept(p, 4, 2), **near)
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_k=3)), kept(p, 3), **near)
    # Of the three that are left, two have 0.78 of the probability.
    sampled = frequencies(Sampling(1.0, top_k=3, top_p=0.7))
    np.testing.assert_allclose(sampled, kept(p, 2), **near)


@pytest.mark.full
def test_the_same_key_draws_the_same_tokens_and_dropout_does_not_act():
    config = dataclasses.replace(ADAPTED, dropout=0.5)
    base = filled(lambda: Llama(LLAMA, scan_layers=True, rngs=nnx.Rngs(0)))
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    model.train()
    sampling, (ids, mask) = Sampling(1.5, top_k=20), left_padded(PROMPTS)

    def tokens(seed):
        options = {"sampling": sampling, "key": jax.random.key(seed)}
        return generate(model, ids, mask, max_new_tokens=6, **options).tokens.tolist()

    assert tokens(0) == tokens(0) != tokens(1)
    greedy = generate(model, ids, mask, max_new_tokens=6).tokens.tolist()
    assert greedy == generate(base, ids, mask, max_new_tokens=6).tokens.tolist()


def test_what_cannot_be_continued_is_refused():
    ids, mask = left_padded(PROMPTS)
    model = forms()["merged"]
    with pytest.raises(ValueError, match="pad on the left"):
        generate(model, ids[:, ::-1], mask[:, ::-1], max_new_tokens=1)
    with pytest.raises(ValueError, match="needs a key"):
        generate(model, ids, mask, max_new_tokens=1, sampling=Sampling(1.0))
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        left_padded([[1], []])
