"""Kernels of a GGUF file in their own bits are those that llama.cpp's own package dequantises."""

from __future__ import annotations

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.decomposition import QuantizedKernel, dense
from experiments.models.gguf_kernels import read_kernel, with_kernels_of
from experiments.models.huggingface import load_llama
from experiments.models.smollm import half_rotated, quantized_smollm2

Q4_0, Q4_1, Q8_0, F16, F32 = (
    gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0", "F16", "F32")
)
OUT, IN = 8, 64


def write(path, types):
    """Writes matrices of two layers, `blk.0` and `blk.1`, and returns them dequantised."""
    rng, expected = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    for number, kind in enumerate(types):
        name, whole = f"blk.{number}.up.weight", rng.normal(size=(OUT, IN)).astype(np.float32)
        data = gguf.quantize(whole, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def reorder(rows):
    return half_rotated(rows, head_dim=4)


@pytest.mark.parametrize(
    ("kind", "format", "bits"),
    [(Q4_0, "int4", 5), (Q4_1, "uint4", 6), (Q8_0, "int8", 9), (F16, None, 0), (F32, None, 0)],
)
def test_a_kernel_in_its_bits_is_the_dequantised_tensor(tmp_path, kind, format, bits):
    (expected,) = write(tmp_path / "a.gguf", [kind]).values()
    (tensor,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    kernel = read_kernel(tensor, reorder)
    if format is not None:
        assert isinstance(kernel, QuantizedKernel)
        assert (kernel.format, kernel.bits) == (format, bits)  # a scale, and an offset, in float32
    np.testing.assert_allclose(dense(kernel), reorder(expected).T, rtol=0, atol=1e-6)


class Stack(nnx.Module):
    def __init__(self, stacked):
        make = nnx.Dict
        if stacked:
            layers = nnx.vmap(lambda rngs: make(up=linear(rngs)))(nnx.Rngs(0).split(2))
        else:
            layers = nnx.List([make(up=linear(nnx.Rngs(i))) for i in range(2)])
        self.layers = layers


def linear(rngs):
    return nnx.Linear(IN, OUT, use_bias=False, rngs=rngs)


def place(name):
    return ("layers", name.split(".")[1], "up"), reorder


@pytest.mark.parametrize(
    "stacked", [pytest.param(False, marks=pytest.mark.full), True], ids=["apart", "stacked"]
)
def test_layers_get_the_kernels_of_a_file(tmp_path, stacked):
    expected = [reorder(x).T for x in write(tmp_path / "a.gguf", [Q4_1, Q4_1]).values()]
    model = with_kernels_of(Stack(stacked), tmp_path / "a.gguf", place)
    layers = model.layers
    if stacked:
        kernels = layers.up.kernel.get_value()
        assert isinstance(kernels, QuantizedKernel) and kernels.offsets.shape == (2, 2, OUT)
        found = dense(kernels)
    else:
        found = [dense(layer.up.kernel.get_value()) for layer in layers]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_stack_of_two_types_is_refused(tmp_path):
    for types, message in (([Q4_1, Q8_0], "2 are .*Q4_1, Q8_0"), ([Q4_1, F32], "of 2 layers 1 ")):
        write(tmp_path / "a.gguf", types)
        with pytest.raises(ValueError, match=rf"layers\.up: .*{message}"):
            with_kernels_of(Stack(True), tmp_path / "a.gguf", place)


@pytest.mark.full
def test_the_packaged_model_in_4_bits_is_the_dequantised_one(smollm2):
    model, whole = quantized_smollm2(scan_layers=True), load_llama(smollm2, scan_layers=True)
    tokens = jnp.arange(8)[None] + 100
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(model, tokens), run(whole, tokens), atol=2e-3)
    kernel = model.layers.mlp.up_proj.kernel.get_value()
    assert kernel.bits == 6
    adapted = dora.apply_dora(model, dora.DoRAConfig(rank=2), rngs=nnx.Rngs(0), inputs=(tokens,))
    np.testing.assert_allclose(run(adapted, tokens), run(model, tokens), atol=2e-3)
