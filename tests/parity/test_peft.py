"""PEFT itself on one side, Flax models on the other: the same outputs, gradients and training."""

from __future__ import annotations

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft as hf_peft
import pytest
import torch
import transformers
from flax import linen as nn
from flax import nnx
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers.models.gpt2 import modeling_flax_gpt2

import dora_jax as dora
from dora_jax import peft
from dora_jax.names import IDENTITY
from dora_jax.peft import folder as files
from tests.parity import torch_models
from tests.support.peft_models import TWINS, Adapted, Twin, build, loss

pytestmark = pytest.mark.parity

STEPS, LEARNING_RATE = 20, 5e-3
TARGETS = {
    "bert": ["query", "attention.output", "layers.0.output", "word_embeddings"],
    "llama": ["q_proj", "k_proj", "down_proj", "embed_tokens"],
    "llama_stacked": ["q_proj", "k_proj", "down_proj", "lm_head"],
    "convolutions": ["conv1", "conv2", "conv3", "head"],
    "convolutions_linen": ["conv1", "conv2", "conv3", "head"],
    "tables": ["wte", "c_fc"],
    "tables_linen": ["wte", "c_fc"],
    "attention": ["query", "key", "value", "out"],
    "attention_linen": ["query", "key", "value", "out"],
}


@functools.cache
def case_and_built(name):
    twin = TWINS[name]
    case = torch_models.CASES[twin.fixture]
    base = torch_models.base_model(case).float().state_dict()
    arrays = {key: x.numpy() for key, x in base.items()}
    inputs = {key: x.numpy() for key, x in case.inputs.items()}
    return case, build(twin, arrays, inputs)


def ours(name, **fields):
    """Returns a Flax model with an adapter as training would leave it."""
    _, built = case_and_built(name)
    fields = {"rank": 2, "alpha": 3.0, "target_modules": TARGETS[name], **fields}
    config = dora.DoRAConfig(norm_gradient="detached", **fields)
    if built.params is None:
        model = dora.apply_dora(built.model, config, rngs=nnx.Rngs(0))
        adapted = Adapted(model, dora.get_adapters(model), None, built)
    else:
        key = jax.random.key(0)
        adapted = Adapted(
            *dora.apply_dora(built.model, config, rng=key, **built.linen), built.params, built
        )
    random = np.random.default_rng(0)
    return adapted.with_tree(
        jax.tree.map(
            lambda x: (
                jnp.asarray(x * (1 + 0.1 * random.normal(size=x.shape)), jnp.float32)
                + jnp.where((x == 0).all(), 0.3 * random.normal(size=x.shape), 0).astype(
                    jnp.float32
                )
            ),
            adapted.tree,
        )
    )


def theirs(case, folder, **options):
    """Returns PEFT's model with the adapter of a folder, having read it without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        model = hf_peft.PeftModel.from_pretrained(torch_models.base_model(case), folder, **options)
    return model.double().eval()


def relative(x, y):
    y = y.detach().numpy()
    return float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())


@pytest.mark.parametrize("name", TARGETS)
def test_peft_computes_what_our_adapter_does(name, tmp_path):
    case, _ = case_and_built(name)
    adapted = ours(name)
    adapted.save(tmp_path)
    model = theirs(case, tmp_path)
    assert relative(adapted(), torch_models.outputs(model, case.inputs)) < 2e-6
    wanted = torch_models.base_model(case)
    assert relative(adapted(), torch_models.outputs(wanted, case.inputs)) > 1e-2
    config, _ = files.read(tmp_path)
    layers = {n for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert layers == {n for n, _ in wanted.named_modules() if config.selects(n)}


@pytest.mark.parametrize("name", TWINS)
def test_our_model_computes_what_pefts_adapter_does(name, tmp_path):
    case, built = case_and_built(name)
    model = torch_models.adapted_model(case, torch_models.base_model(case))
    model.float().save_pretrained(tmp_path)
    y = torch_models.outputs(model.double(), case.inputs)
    adapted = built.load(tmp_path)
    assert relative(adapted(), y) < 2e-6
    # And back: PEFT reads what was written again, and computes the same, bit for bit.
    adapted.save(tmp_path / "again")
    again = theirs(case, tmp_path / "again")
    assert torch.equal(torch_models.outputs(again, case.inputs), y)


@pytest.mark.parametrize("name", ["bert", "llama_stacked", "convolutions_linen", "tables"])
def test_training_goes_on_in_peft_as_here(name, tmp_path):
    case, _ = case_and_built(name)
    adapted = ours(name)
    adapted.save(tmp_path)
    value_and_grad = jax.value_and_grad(lambda tree: loss(adapted(tree)))
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)

    @jax.jit
    def step(tree, state):
        value, gradient = value_and_grad(tree)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value, gradient

    tree, state = adapted.tree, optimizer.init(adapted.tree)
    losses = []
    for i in range(STEPS):
        tree, state, value, gradient = step(tree, state)
        losses.append(float(value))
        if i == 0:
            adapted.save(tmp_path / "gradient", adapters=gradient)
    model = theirs(case, tmp_path, is_trainable=True)
    gradients = torch_models.gradients(model, case.inputs)
    own = files.read(tmp_path / "gradient")[1]
    assert own.keys() == gradients.keys()
    for key, x in gradients.items():
        assert relative(own[key], x) < 1e-5, key
    wanted = torch_models.train(model, case.inputs, STEPS, LEARNING_RATE)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    # The adapters they end with, too.
    adapted.save(tmp_path / "trained", adapters=tree)
    trained = torch_models.outputs(theirs(case, tmp_path / "trained"), case.inputs)
    assert relative(trained.detach(), torch_models.outputs(model, case.inputs)) < 1e-4


class GPT2(nn.Module):
    """Transformers' Flax GPT-2, called with token ids alone."""

    @nn.compact
    def __call__(self, input_ids):
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        config = transformers.GPT2Config(**sizes)
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        model = modeling_flax_gpt2.FlaxGPT2LMHeadModule(config, name="model")
        return model(input_ids, jnp.ones_like(input_ids), positions).logits


def test_transformers_own_flax_models_need_no_map(tmp_path):
    # Its kernels are (out, in).
    layout = dora.layers.einsum_layout(lambda layer, call: "...i,oi->...o")
    dora.layers.register_layout(modeling_flax_gpt2.FlaxConv1D, layout)
    case = torch_models.CASES["gpt2"]
    base = torch_models.base_model(case)
    arrays = {key: x.float().numpy() for key, x in base.state_dict().items()}
    inputs = {key: x.numpy() for key, x in case.inputs.items()}
    built = build(Twin("gpt2", GPT2, IDENTITY.inside("model")), arrays, inputs)
    model = torch_models.adapted_model(case, base)
    model.float().save_pretrained(tmp_path)
    adapted = built.load(tmp_path)
    y = torch_models.outputs(model.double(), case.inputs)
    assert relative(adapted(), y) < 2e-6
    adapted.save(tmp_path / "again")
    again = theirs(case, tmp_path / "again")
    assert torch.equal(torch_models.outputs(again, case.inputs), y)


def test_peft_loads_adapters_by_name_and_ours_do(tmp_path):
    case, built = case_and_built("attention")
    one, other = ours("attention"), ours("attention", rank=3)
    one.save(tmp_path)
    other.save(tmp_path / "other")
    model = theirs(case, tmp_path)
    model.load_adapter(tmp_path / "other", "other")
    model.double().eval()
    for name, adapted in (("default", one), ("other", other)):
        model.set_adapter(name)
        assert relative(adapted(), torch_models.outputs(model, case.inputs)) < 2e-6
    model.float().save_pretrained(tmp_path / "both")
    both = tmp_path / "both"
    for folder, adapted in ((both, one), (both / "other", other)):
        tree = built.load(folder).tree
        jax.tree.map(np.testing.assert_array_equal, tree, adapted.tree)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_adapters_of_peft_are_read_without_loss(tmp_path, dtype):
    case, built = case_and_built("attention")
    model = torch_models.adapted_model(case, torch_models.base_model(case))
    model.to(dtype).save_pretrained(tmp_path)
    tree, _ = built.read(tmp_path)
    wanted = hf_peft.get_peft_model_state_dict(model)
    adapted = built.load(tmp_path)
    adapted.save(tmp_path / "again", dtype=jax.tree.leaves(tree)[0].dtype)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == wanted.keys()
    assert all(again[k].dtype == dtype and torch.equal(again[k], x) for k, x in wanted.items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_start_from_the_base_act_alike_in_peft(tmp_path, init):
    case, _ = case_and_built("attention")
    adapted = ours("attention", init=init)
    adapted.save(tmp_path)
    model = theirs(case, tmp_path)
    assert relative(adapted(), torch_models.outputs(model, case.inputs)) < 2e-6


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_of_a_mutated_base_are_read_once_peft_has_converted_them(tmp_path, init):
    case, built = case_and_built("attention")
    lora = hf_peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    model = hf_peft.get_peft_model(torch_models.base_model(case).float(), lora)
    model.save_pretrained(tmp_path / "start")
    torch_models.train(model, case.inputs, 3, 1e-2)
    model.save_pretrained(tmp_path / "mutated")
    with pytest.raises(peft.PeftError, match="replaced weights of the base"):
        built.load(tmp_path / "mutated")
    y = torch_models.outputs(model, case.inputs)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    assert relative(built.load(tmp_path / "converted")(), y) < 1e-5


NAMES = [
    f"model.layers.{i}.{part}.{name}_proj"
    for i in (0, 1, 11)
    for part, names in (("self_attn", "qkvo"), ("mlp.experts.1", ("up", "down")))
    for name in names
] + ["lm_head", "model.embed_tokens", "layers.1.up_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["mlp.experts.1.up_proj", "lm_head"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["up_proj"], "exclude_modules": ["layers.0.mlp.experts.1.up_proj"]},
        {"target_modules": r".*up_proj", "exclude_modules": r".*\.11\..*"},
        {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["up_proj", "lm_head"], "layers_to_transform": 11},
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["experts", "layers"],
        },
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "experts"},
        {"target_modules": ["up_proj", "q_proj"], "modules_to_save": ["layers.0", "lm_head"]},
        {
            "target_modules": r".*_proj",
            "rank_pattern": {"q_proj": 4, r"layers.1\..*": 5, "^lm_head": 6},
            "alpha_pattern": {"1.up_proj": 2, "mlp.*": 3},
        },
    ],
)
def test_fields_select_and_scale_as_in_peft(fields):
    theirs = hf_peft.LoraConfig(r=2, lora_alpha=7, **fields)
    text = json.dumps(theirs.to_dict(), default=list)
    own = peft.PeftConfig.from_json(text)
    for name in NAMES:
        if own.may_select(name) and Version(hf_peft.__version__) < Version("0.21"):
            continue
        assert own.selects(name) == bool(check_target_module_exists(theirs, name)), name
        for pattern, default, value in (
            (theirs.rank_pattern, theirs.r, own.rank(name)),
            (theirs.alpha_pattern, theirs.lora_alpha, own.alpha(name)),
        ):
            assert value == pattern.get(get_pattern_key(pattern.keys(), name), default), name
