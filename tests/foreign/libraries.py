"""Models of NNX libraries from the package index."""

from __future__ import annotations

import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
from flax import nnx

import dora_jax as dora
from tests.foreign.harness import CONFIG, NNXCase


def _skip_package_init(name: str) -> None:
    """Lets a package's modules be imported without its `__init__`.

    Tunix imports its trainers and data loaders there, and with them some 70 packages; its models
    need Flax and jaxtyping.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


_skip_package_init("tunix")

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402

IDS = jax.random.randint(jax.random.key(4), (2, 6), 0, 40)
POSITIONS = jnp.broadcast_to(jnp.arange(6), IDS.shape)
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))

# Tunix's own layer: a parameter `w`, and an equation among its attributes.
dora.layers.register_layout(
    llama3.Einsum,
    dora.layers.einsum_layout(lambda layer, call: layer.einsum_str, kernel="w", inputs="x"),
)


def mamba2(config: dora.DoRAConfig = CONFIG) -> NNXCase:
    """A state-space model."""
    sizes = Mamba2Config(
        vocab_size=40,
        hidden_size=16,
        state_size=4,
        head_dim=8,
        chunk_size=4,
        num_hidden_layers=2,
    )
    model = Mamba2ForCausalLM(sizes, rngs=nnx.Rngs(0))
    return NNXCase(model, (IDS,), config, output=lambda output: output["logits"])


def tunix_llama() -> NNXCase:
    sizes = llama3.ModelConfig(
        num_layers=2,
        vocab_size=40,
        embed_dim=16,
        hidden_dim=32,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
        remat_config=llama3.RematConfig.BLOCK,
    )
    model = llama3.Llama3(sizes, rngs=nnx.Rngs(0))
    heads = dora.decomposition.KernelAxes((), (0,), (1, 2))
    return NNXCase(
        model,
        (IDS, POSITIONS, None, CAUSAL),
        output=lambda output: output[0],
        axes={
            "q_proj": heads,
            "k_proj": heads,
            "v_proj": heads,
            "o_proj": dora.decomposition.KernelAxes((), (0, 1), (2,)),
        },
    )


CASES = {
    "mamba2-jax Mamba2 (NNX)": mamba2,
    "tunix Llama 3 (NNX)": tunix_llama,
}
