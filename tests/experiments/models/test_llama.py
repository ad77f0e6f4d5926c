"""The decoder's own laws. Agreement with Hugging Face is in test_huggingface.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from experiments.models.config_file import ModelConfigError
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig, RopeScaling
from experiments.models.rotary import rotary_frequencies, rotate
from tests.experiments.tiny_models import LLAMA, filled

CONFIGS = pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        pytest.param(
            dataclasses.replace(LLAMA, model_type="qwen3", head_dim=8, tie_word_embeddings=True),
            marks=pytest.mark.full,
        ),
        dataclasses.replace(LLAMA, model_type="qwen2", sliding_window=3),
    ],
    ids=["llama", "tied qwen3", "windowed qwen2"],
)
ONE_LAYER = dataclasses.replace(LLAMA, num_hidden_layers=1)
TOKENS = np.array([[5, 9, 30, 1, 7, 8], [5, 22, 6, 8, 33, 12]])
STORED = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}

apply = nnx.jit(lambda model, *inputs: model(*inputs))


def model_of(config, **options):
    return filled(lambda: Llama(config, **options, rngs=nnx.Rngs(0)))


@functools.cache
def made(config, scan_layers=False):
    """A model that the tests share; none may change it."""
    return model_of(config, scan_layers=scan_layers)


def stacked(model):
    """The model of scanned layers that holds the parameters of a model of numbered ones."""
    scanned = nnx.eval_shape(lambda: Llama(model.config, scan_layers=True, rngs=nnx.Rngs(0)))
    layers = [nnx.state(layer) for layer in model.layers]
    nnx.update(scanned.layers, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers))
    for name in set(dir(model)) & {"embed_tokens", "norm", "lm_head"}:
        nnx.update(getattr(scanned, name), nnx.state(getattr(model, name)))
    return scanned


def loss(model, tokens):
    log_p = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], 2).mean()


def stored_config(tmp_path, **changes):
    """Writes a config.json; a change to `...` leaves the field out."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in (STORED | changes).items() if v is not ...}))
    return path


@pytest.mark.rows(1)
@CONFIGS
def test_scanned_layers_compute_what_numbered_ones_do(config):
    model = made(config)
    expected, found = apply(model, TOKENS), apply(stacked(model), TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        (False, True),
        pytest.param(True, jax.checkpoint_policies.dots_saveable, marks=pytest.mark.full),
    ],
    ids=["numbered", "scanned"],
)
def test_rematerialised_layers_have_the_same_gradients(scan_layers, remat):
    plain = made(ONE_LAYER, scan_layers)
    expected = nnx.jit(nnx.grad(loss))(plain, TOKENS)
    abstract = nnx.eval_shape(
        lambda: Llama(ONE_LAYER, scan_layers=scan_layers, remat=remat, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.graphdef(abstract), nnx.state(plain)
    jaxpr = str(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(TOKENS))(state))
    assert re.search(r"(remat|checkpoint)\w*\[", jaxpr)
    assert ("policy=None" in jaxpr) == (remat is True)
    found = nnx.jit(nnx.grad(loss))(nnx.merge(graphdef, state), TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@CONFIGS
def test_a_token_changes_nothing_before_it(config):
    changed = TOKENS.copy()
    changed[:, 3] = 2
    before, after = apply(made(config), TOKENS), apply(made(config), changed)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-4).all()


@pytest.mark.rows(1)
@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_other_positions(config, side):
    mask = np.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
    tokens = TOKENS * mask
    if side == "left":
        mask[1], tokens[1] = np.roll(mask[1], 2), np.roll(tokens[1], 2)
    alone = apply(made(config), TOKENS[1:, :4])
    batched = apply(made(config), tokens, mask)
    np.testing.assert_allclose(batched[1][mask[1] == 1], alone[0], atol=2e-5)


def test_a_row_of_padding_alone_is_finite_in_value_and_gradient():
    mask = np.zeros_like(TOKENS)
    squares = nnx.value_and_grad(lambda model: (model(TOKENS, mask) ** 2).sum())
    value, grads = nnx.jit(squares)(made(ONE_LAYER))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_only_differences_of_positions_matter():
    positions = np.broadcast_to(np.arange(6), TOKENS.shape)
    expected = apply(made(LLAMA), TOKENS, None, positions)
    shifted = apply(made(LLAMA), TOKENS, None, positions + 17)
    np.testing.assert_allclose(shifted, expected, atol=1e-4)
    stretched = apply(made(LLAMA), TOKENS, None, positions * 3)
    assert np.abs(stretched - expected).max() > 1e-2


def test_a_rotation_is_that_of_complex_numbers():
    rng = np.random.default_rng(0)
    x, angles = rng.normal(size=(2, 5, 3, 8)), rng.normal(size=(2, 5, 4))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles[:, :, None])
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(jax.jit(rotate)(x, angles), expected, atol=1e-6)


def test_llama_3_frequencies_are_those_of_its_description():
    """Llama 3.1 divides wavelengths above 8192 by 8 and leaves those below 2048."""
    scaling = RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    config = dataclasses.replace(LLAMA, head_dim=128, rope_theta=5e5)
    plain = np.asarray(rotary_frequencies(config))
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(64) / 64), rtol=1e-5)
    scaled = np.asarray(rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling)))
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 2048], plain[wavelength < 2048], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any() and (np.diff(scaled) < 0).all()
    assert (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


@pytest.mark.full
@pytest.mark.parametrize(
    "scan_layers",
    [True, pytest.param(False, marks=pytest.mark.full)],
    ids=["scanned", "numbered"],
)
def test_an_adapted_model_starts_as_its_base_and_trains(scan_layers):
    base = made(LLAMA, scan_layers)
    config = dora.DoRAConfig(rank=2, target_modules=["k_proj"])
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    expected = apply(base, TOKENS)
    np.testing.assert_array_equal(apply(model, TOKENS), expected)
    diff = nnx.DiffState(0, dora.DoRAParam)
    grads = nnx.jit(nnx.grad(loss, argnums=diff))(model, TOKENS)
    magnitudes = [g for path, g in nnx.to_flat_state(grads) if path[-1] == "magnitude"]
    assert len(magnitudes) == (1 if scan_layers else 2)
    assert all((np.abs(g[...]).max(-1) > 0).all() for g in magnitudes)
    dora.set_adapters(model, jax.tree.map(lambda x: x + np.float32(0.05), dora.get_adapters(model)))
    merged, adapted = apply(dora.merge(model), TOKENS), apply(model, TOKENS)
    np.testing.assert_allclose(merged, adapted, atol=1e-4)
    assert np.abs(adapted - expected).max() > 1e-2


@pytest.mark.parametrize("scan_layers", [False, True], ids=["numbered", "scanned"])
def test_an_abstract_model_can_be_adapted(scan_layers):
    base = nnx.eval_shape(lambda: Llama(LLAMA, scan_layers=scan_layers, rngs=nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=2, target_modules=["up_proj"])
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    layer = model.layers if scan_layers else model.layers[0]
    assert layer.mlp.up_proj.lora_a.shape == ((2, 16, 2) if scan_layers else (16, 2))


@pytest.mark.full
def test_a_scan_of_adapted_layers_copies_no_parameters():
    wide = dataclasses.replace(LLAMA, hidden_size=64, intermediate_size=128)
    base = nnx.eval_shape(lambda: Llama(wide, scan_layers=True, remat=True, rngs=nnx.Rngs(0)))
    config = dora.DoRAConfig(rank=2, target_modules=["up_proj"])
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model)

    def gradients(state):
        model = nnx.merge(graphdef, state)
        return nnx.grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model, TOKENS[:1, :3])

    compiled = jax.jit(gradients).lower(state).compile()
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(nnx.state(model.layers, nnx.Param)))
    assert compiled.memory_analysis().temp_size_in_bytes < parameters


def test_dtypes_of_computation_and_parameters_are_kept():
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.float16}
    model = nnx.eval_shape(lambda: Llama(ONE_LAYER, **dtypes, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float16)}
    nnx.update(model, nnx.state(made(ONE_LAYER)))
    assert apply(model, TOKENS).dtype == jnp.bfloat16
    error = apply(model, TOKENS).astype(np.float32) - apply(made(ONE_LAYER), TOKENS)
    assert np.abs(error).mean() < 0.05  # logits are of size 1


def test_wrong_shapes_of_inputs_are_named():
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, seq\)"):
        made(LLAMA)(TOKENS[0])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        made(LLAMA)(TOKENS, TOKENS[:, :3])
    with pytest.raises(ValueError, match="position_ids has shape"):
        made(LLAMA)(TOKENS, None, TOKENS[:1])


def test_a_stored_config_falls_back_on_hugging_faces_defaults(tmp_path):
    config = LlamaConfig.from_json(stored_config(tmp_path))
    assert (config.key_value_heads, config.head_size, config.rope_theta) == (4, 4, 1e4)
    assert (config.tie_word_embeddings, config.qkv_bias, config.qk_norm) == (False, False, False)
    mistral = stored_config(tmp_path, model_type="mistral", num_attention_heads=8)
    assert LlamaConfig.from_json(mistral).sliding_window == 4096
    none = stored_config(tmp_path, model_type="mistral", sliding_window=None, num_attention_heads=8)
    assert LlamaConfig.from_json(none).sliding_window is None
    qwen3 = stored_config(tmp_path, model_type="qwen3", num_key_value_heads=2)
    assert LlamaConfig.from_json(qwen3).head_size == 128


def test_rotary_fields_are_read_where_older_and_newer_transformers_write_them(tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0}
    newer = LlamaConfig.from_json(
        stored_config(tmp_path, rope_parameters={"rope_theta": 5e5, **linear})
    )
    older = LlamaConfig.from_json(
        stored_config(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    )
    assert newer == older
    assert older.rope_scaling == RopeScaling(**linear) and older.rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"hidden_act": "swiglu"}, "hidden_act 'swiglu'"),
        ({"hidden_size": ..., "vocab_size": ...}, "missing vocab_size, hidden_size"),
        ({"hidden_size": "16"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple"),
        ({"head_dim": 5}, "odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"mlp_bias": "no"}, "mlp_bias must be a bool"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor must be"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be"),
        ({"rope_scaling": 2}, "rope_scaling must be an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "use_sliding_window",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, changes, message):
    path = stored_config(tmp_path, **changes)
    with pytest.raises(ModelConfigError, match=message) as caught:
        LlamaConfig.from_json(path)
    assert str(path) in str(caught.value)
