"""Every implementation of attention that can run here computes what the plain one does."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.attention import AttentionError, Case, causal_attention, choose
from experiments.models.splash import visited_share
from tests.checkpoint.runs import run_module

BASE = {"platform": "tpu", "length": 4096, "features": 128, "dtype": "bfloat16", "padded": False}
LENGTH = 256


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "splash"),
        ({"padded": True}, "splash"),
        ({"length": 512}, "plain"),  # short
        ({"length": 4000}, "plain"),  # not of whole blocks
        ({"platform": "gpu"}, "cudnn"),
        ({"platform": "gpu", "length": 100}, "cudnn"),
        ({"platform": "gpu", "dtype": "float32"}, "plain"),
        ({"platform": "gpu", "features": 100}, "plain"),
        ({"platform": "gpu", "padded": True}, "plain"),
        ({"platform": "cpu"}, "plain"),
    ],
)
def test_the_fastest_that_can_run_is_chosen(changes, expected):
    assert choose("auto", Case(**(BASE | changes))) == expected


@pytest.mark.parametrize(
    ("setting", "changes", "reason"),
    [
        ("splash", {"length": 100}, "multiple of 128 tokens, not 100"),
        ("splash", {"platform": "gpu"}, "for TPUs"),
        ("cudnn", {}, "for GPUs, not for a tpu"),
        ("cudnn", {"platform": "gpu", "dtype": "float32"}, "not float32"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(setting, changes, reason):
    with pytest.raises(AttentionError, match=reason):
        choose(setting, Case(**(BASE | changes)))


def test_the_choice_is_logged(caplog):
    x = jnp.ones((1, 3, 1, 8))
    with caplog.at_level("INFO", logger="experiments.models.attention"):
        jax.eval_shape(causal_attention, x, x, x)
    assert "attention: plain (cpu, 3 tokens, heads of 8, float32); cudnn: it is for GPUs" in (
        caplog.text
    )


def test_the_share_of_blocks_counts_those_that_a_position_sees():
    positions = np.arange(1024)
    for window in (None, 1, 512, 513, 700):
        seen = positions[None] <= positions[:, None]
        if window:
            seen &= positions[None] > positions[:, None] - window
        blocks = seen.reshape(2, 512, 2, 512).any((1, 3))
        assert visited_share(1024, window) == blocks.mean()


def inputs(dtype):
    """Queries of 4 heads, keys and values of 2."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, LENGTH, n, 16)), dtype) for n in (4, 2, 2)]


def outputs_and_gradients(setting, mask, window):
    """The outputs where there is text, and the gradients of a function of them."""
    real = jnp.ones((2, LENGTH)) if mask is None else jnp.asarray(mask)

    def loss(q, k, v):
        y = causal_attention(q, k, v, mask=mask, window=window, setting=setting)
        y = jnp.where(real[..., None, None] != 0, y, 0)
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def assert_equal_to_plain(setting, mask, window, dtype):
    found, expected = (
        jax.tree.leaves(outputs_and_gradients(one, mask, window)(*inputs(dtype))[:])
        for one in (setting, "plain")
    )
    bound = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    for one, other in zip(found[1:], expected[1:], strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.abs(one - other).max() <= bound * np.abs(other).max()


def padding():
    """Text after padding, text before it, in numbers as tokenizers give them."""
    mask = np.ones((2, LENGTH), np.int32)
    mask[0, :30] = mask[1, -50:] = 0
    return mask


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 40], ids=["all", "windowed"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_splash_attention_computes_what_the_plain_one_does(padded, window, dtype):
    assert_equal_to_plain("splash", padding() if padded else None, window, dtype)


@pytest.mark.full
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("window", [None, 40], ids=["all", "windowed"])
def test_cudnn_computes_what_the_plain_attention_does(window):
    assert_equal_to_plain("cudnn", None, window, "bfloat16")


@pytest.mark.full
def test_on_a_mesh_attention_and_a_decoder_compute_what_one_device_does():
    found = json.loads(run_module("tests.experiments.models.on_devices", devices=4))
    assert len(found) == 6
    assert max(found.values()) < 5e-6, found
