"""Adapters that PEFT cannot represent are not written, and configurations of others not read."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import dora_jax as dora
from dora_jax.names import IDENTITY, LLAMA
from dora_jax.peft import PeftError, read_adapters, save_pretrained
from tests.peft.small_models import MLP, adapted, drop_digest, edit_config, plain
from tests.support.checkpoints import filled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "replaced weights of the base"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not known"),
        ({"bias": "lora_only"}, "bias='lora_only': trained biases are not read"),
        ({"lora_bias": True}, "lora_bias is set: a bias in lora_B"),
        ({"trainable_token_indices": [1]}, "trained rows of the embedding"),
        ({"layer_replication": [[0, 2]]}, "another depth"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"something_new": 3}, "something_new=3 in adapter_config.json is not known"),
        ({"r": 0}, "r in adapter_config.json has an invalid value, 0"),
        ({"r": 3}, "makes its rank 3"),
        ({"r": None}, "has no r"),
        ({"lora_alpha": "4"}, "lora_alpha in adapter_config.json has an invalid value"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"use_dora": 1}, "use_dora"),
        ({"use_dora": False}, "lora_magnitude_vector is there although use_dora is False"),
        ({"target_modules": "(up"}, "'(up' is not a regular expression"),
        ({"target_modules": ["up"]}, "which target_modules does not select"),
        ({"target_modules": ["up", "down", "head"]}, "the file holds no adapter of it"),
        ({"exclude_modules": ["up"]}, "which target_modules does not select"),
        ({"rank_pattern": {"up": -1}}, "rank_pattern"),
        ({"modules_to_save": ["head"]}, "head.bias is missing"),
    ],
)
def test_a_config_that_is_not_the_adapters_is_refused(tmp_path, fields, message):
    save_pretrained(adapted(), tmp_path, IDENTITY)
    edit_config(tmp_path, **fields)
    drop_digest(tmp_path)
    with pytest.raises(PeftError, match=re.escape(message)):
        read_adapters(plain(), tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": False}, "down has normalize=False; PEFT always divides by the norm"),
        ({"magnitude_trainable": False}, "down has magnitude_trainable=False"),
        ({"rank_pattern": {"up": 0}}, "up has rank 0; PEFT has no magnitude without lora_A"),
    ],
)
def test_settings_that_peft_lacks_are_not_written(tmp_path, fields, message):
    with pytest.raises(PeftError, match=re.escape(message)):
        save_pretrained(adapted(**fields), tmp_path, IDENTITY)
    assert not any(tmp_path.iterdir())


def test_a_precomputed_model_and_one_without_an_adapter_are_not_written(tmp_path):
    precomputed = dora.precompute_scales(adapted(model=filled(MLP), target_modules=["up"]))
    with pytest.raises(PeftError, match="up holds a precomputed scale"):
        save_pretrained(precomputed, tmp_path, IDENTITY)
    with pytest.raises(dora.errors.AdapterError, match="no adapter"):
        save_pretrained(plain(), tmp_path, IDENTITY)
    only_saved = adapted(target_modules=[], modules_to_save=["head"])
    with pytest.raises(PeftError, match="no layer is adapted"):
        save_pretrained(only_saved, tmp_path, IDENTITY)


CONVOLUTIONS = pytest.mark.parametrize(
    ("conv", "linen_conv", "message"),
    [
        (
            lambda rngs: nnx.Conv(4, 4, 3, feature_group_count=2, rngs=rngs),
            nn.Conv(4, 3, feature_group_count=2),
            "feature_group_count=2",
        ),
        (
            lambda rngs: nnx.Conv(4, 4, 3, kernel_dilation=2, rngs=rngs),
            nn.Conv(4, 3, kernel_dilation=2),
            "kernel_dilation=2",
        ),
        (
            lambda rngs: nnx.ConvTranspose(4, 4, 3, rngs=rngs),
            nn.ConvTranspose(4, (3,)),
            "transposed convolutions",
        ),
    ],
)


@CONVOLUTIONS
def test_convolutions_that_peft_adapts_otherwise_are_refused(tmp_path, conv, linen_conv, message):
    model = adapted(lambda rngs: nnx.Sequential(conv(rngs)), target_modules=["0"])
    with pytest.raises(PeftError, match=re.escape(message)):
        save_pretrained(model, tmp_path, IDENTITY)
    module, x = nn.Sequential([linen_conv]), jnp.ones((1, 5, 4))
    model, adapters = adapted_linen(module, x, "layers_0")
    with pytest.raises(PeftError, match=re.escape(message)):
        save_pretrained(model, tmp_path, IDENTITY, adapters=adapters)


def adapted_linen(module, x, target):
    """Returns an adapted Linen module and its abstract adapters."""
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    config = dora.DoRAConfig(rank=2, target_modules=[target])
    return dora.apply_dora(module, config, params=params, rng=jax.random.key(1), inputs=(x,))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(9, 4, rngs=rngs)

    def __call__(self, ids):
        return self.embed_tokens.attend(self.embed_tokens(ids))


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(9, 4, name="embed_tokens")
        return table.attend(table(ids))


def test_a_table_that_is_the_head_too_is_refused(tmp_path):
    # Here the head sees the adapter, in PEFT it does not.
    with pytest.raises(PeftError, match="head that is tied to the table"):
        save_pretrained(adapted(Tied, target_modules=["embed_tokens"]), tmp_path, LLAMA)
    # A Linen model's parameters are not at hand: it may have a head of its own.
    model, tree = adapted_linen(LinenTied(), jnp.ones(2, int), "embed_tokens")
    tree = jax.tree.map(lambda x: jnp.ones(x.shape), tree)
    with pytest.warns(UserWarning, match="embed_tokens: PEFT adapts the lookup alone"):
        save_pretrained(model, tmp_path, LLAMA, adapters=tree)


def test_a_layer_that_is_the_whole_model_is_refused(tmp_path):
    model = adapted(lambda rngs: nnx.Linear(4, 3, rngs=rngs), target_modules="all-linear")
    with pytest.raises(PeftError, match="put it into a module"):
        save_pretrained(model, tmp_path, IDENTITY)


def test_parameters_that_are_others_in_torch_are_refused(tmp_path):
    def after_a_layer(make):
        def layers(rngs):
            return nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), make(rngs))

        return adapted(layers, target_modules="all-linear", modules_to_save=["layers.1"])

    with pytest.raises(PeftError, match=r"layers.1 has running statistics"):
        save_pretrained(after_a_layer(lambda rngs: nnx.BatchNorm(3, rngs=rngs)), tmp_path, IDENTITY)
    heads = after_a_layer(lambda rngs: nnx.LinearGeneral(3, (2, 2), rngs=rngs))
    with pytest.raises(PeftError, match=r"layers.1 is in modules_to_save with a kernel of 3 axes"):
        save_pretrained(heads, tmp_path, IDENTITY)
