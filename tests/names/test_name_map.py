"""Name maps: which Hugging Face module each Flax module is, and their parameters both ways."""

from __future__ import annotations

import re

import numpy as np
import pytest

import dora_jax as dora
from dora_jax.names import BERT, IDENTITY, LLAMA, HFModule, Interleaved, NameMap, NameMapError

EXPERTS = NameMap({"layers.{i}.experts.{e}.up": "h.{i}.moe.{e}.w1", "h_{i}.down": "h.{i}.w2"})


@pytest.mark.parametrize(
    ("names", "path", "wanted"),
    [
        (BERT, "layers.1.attention.query", "encoder.layer.1.attention.self.query"),
        (BERT, "embeddings.layer_norm", "embeddings.LayerNorm"),
        (LLAMA, "layers.11.self_attn.o_proj", "model.layers.11.self_attn.o_proj"),
        (LLAMA, "lm_head", "lm_head"),
        (IDENTITY, "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        (IDENTITY.inside("model"), "model.transformer.wte", "transformer.wte"),
        (IDENTITY | {"wte": "embeddings"}, "wte", "embeddings"),
        (EXPERTS, "layers.2.experts.3.up", "h.2.moe.3.w1"),
        (EXPERTS, "h_7.down", "h.7.w2"),
        (LLAMA.inside("decoder", "language_model"), "decoder.norm", "language_model.model.norm"),
    ],
)
def test_a_path_has_one_name_both_ways(names, path, wanted):
    assert names.find(path).names() == [wanted]
    assert names.path(wanted) == path


def test_stacked_modules_have_a_name_for_each_slice():
    module = EXPERTS.find("layers.experts.up")
    assert module.stacked == ("i", "e")
    assert module.names((2, 2)) == ["h.0.moe.0.w1", "h.0.moe.1.w1", "h.1.moe.0.w1", "h.1.moe.1.w1"]
    # A stack of experts in numbered layers.
    assert EXPERTS.find("layers.4.experts.up").names((2,)) == ["h.4.moe.0.w1", "h.4.moe.1.w1"]
    with pytest.raises(NameMapError, match="1 stack axes, its name has placeholders for 2"):
        module.names((2,))
    with pytest.raises(NameMapError, match="1 stack axes"):
        IDENTITY.find("layers.up").names((2,))


def test_a_path_that_is_not_in_the_map_is_an_error_with_the_nearest_ones():
    with pytest.raises(NameMapError, match=r"layers.0.mlp.up: .*layers.\{i\}.mlp.up_proj"):
        LLAMA.find("layers.0.mlp.up")
    assert LLAMA.path("model.layers.0.mlp.up") is None
    assert LLAMA.path("model.layers.x.mlp.up_proj") is None
    extended = LLAMA | {"layers.{i}.mlp.up": "model.layers.{i}.mlp.up"}
    assert extended.find("layers.0.mlp.up").name == "model.layers.0.mlp.up"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"layers.{i}.up": "h.up"}, "differ in their placeholders"),
        ({"a": "x", "b": "x"}, "both stand for 'x'"),
    ],
)
def test_a_map_that_is_not_one_to_one_is_refused(modules, message):
    with pytest.raises(NameMapError, match=re.escape(message)):
        NameMap(modules)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


SPLIT = dora.decomposition.KernelAxes((), (0,), (1, 2))
JOIN = dora.decomposition.KernelAxes((), (0, 1), (2,))


@pytest.mark.parametrize(
    ("names", "path", "shape", "axes", "weight"),
    [
        (LLAMA, "layers.0.mlp.up_proj.kernel", (4, 6), None, lambda x: x.T),
        (LLAMA, "norm.scale", (4,), None, lambda x: x),
        (LLAMA, "embed_tokens.embedding", (9, 4), None, lambda x: x),
        (IDENTITY, "conv.kernel", (3, 2, 5, 6), None, lambda x: x.transpose(3, 2, 0, 1)),
        (IDENTITY, "q.kernel", (4, 2, 3), SPLIT, lambda x: x.reshape(4, 6).T),
        (IDENTITY, "q.bias", (2, 3), None, lambda x: x.reshape(6)),
        (IDENTITY, "o.kernel", (2, 3, 4), JOIN, lambda x: x.reshape(6, 4).T),
        (IDENTITY, "bn.mean", (4,), None, lambda x: x),
        (IDENTITY, "x.own_parameter", (4, 5), None, lambda x: x),
        (NameMap({"c": HFModule("c", transposed=True)}), "c.kernel", (4, 6), None, lambda x: x),
    ],
)
def test_parameters_are_those_of_torch_and_back(names, path, shape, axes, weight):
    x = random(*shape)
    ((name, tensor),) = names.to_hf(path, x, axes).items()
    assert [name] == names.tensor_names(path)
    np.testing.assert_array_equal(tensor, weight(x))
    back = names.from_hf(path, shape, {name: tensor}.__getitem__, axes)
    np.testing.assert_array_equal(back, x)


def test_a_stacked_kernel_is_one_weight_for_each_slice():
    x = random(3, 4, 6)
    tensors = LLAMA.to_hf("layers.mlp.up_proj.kernel", x)
    for i in range(3):
        np.testing.assert_array_equal(tensors[f"model.layers.{i}.mlp.up_proj.weight"], x[i].T)
    back = LLAMA.from_hf("layers.mlp.up_proj.kernel", (3, 4, 6), tensors.__getitem__)
    np.testing.assert_array_equal(back, x)


def test_a_tensor_of_another_shape_is_refused():
    read = {"lm_head.weight": random(4, 6)}.__getitem__
    with pytest.raises(NameMapError, match=r"lm_head.weight has shape \(4, 6\), .* needs \(6, 4\)"):
        LLAMA.from_hf("lm_head.kernel", (4, 6), read)


def rotate_neighbours(x, angles):
    """The rotary embedding of the paper (arXiv 2104.09864, eq. 34) on pairs (2k, 2k + 1)."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = [
        even * np.cos(angles) - odd * np.sin(angles),
        even * np.sin(angles) + odd * np.cos(angles),
    ]
    return np.stack(turned, -1).reshape(x.shape)


def rotate_halves(x, angles):
    first, second = np.split(x, 2, -1)
    turned = [
        first * np.cos(angles) - second * np.sin(angles),
        first * np.sin(angles) + second * np.cos(angles),
    ]
    return np.concatenate(turned, -1)


def test_interleaved_features_attend_as_half_rotated_ones_do():
    heads, head_dim = 2, 6
    order = HFModule("q", Interleaved(head_dim))
    w = random(5, heads * head_dim)  # (in, out), interleaved
    tensor = NameMap({"q": order}).to_hf("q.kernel", w)["q.weight"]
    x, angles = random(7, 5), np.arange(7)[:, None, None] * random(3)
    scores = {}
    for name, kernel, rotate in (("ours", w, rotate_neighbours), ("hf", tensor.T, rotate_halves)):
        q = rotate((x @ kernel).reshape(7, heads, head_dim), angles)
        scores[name] = np.einsum("qnh,knh->nqk", q, q)
    np.testing.assert_allclose(scores["hf"], scores["ours"], rtol=1e-5)
    np.testing.assert_array_equal(order.from_hf_order(order.to_hf_order(w)), w)


def test_features_that_are_not_rotated_stay():
    assert Interleaved(6, rotary_dim=4).order(6).tolist() == [0, 2, 1, 3, 4, 5]
    for wrong in ({"head_dim": 3}, {"head_dim": 4, "rotary_dim": 6}):
        with pytest.raises(NameMapError, match="in pairs"):
            Interleaved(**wrong)
    with pytest.raises(NameMapError, match="6 features do not divide into heads of 4"):
        Interleaved(4).order(6)
