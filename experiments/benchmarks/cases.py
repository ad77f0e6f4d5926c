"""The models that are measured: their sizes, batches and losses.

Weights are random, because they do not change the time. Each case is made by a function of its
sizes, so that the tests can run smaller ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dora_jax as dora
from experiments.benchmarks.steps import Adapter
from experiments.models.bert import BertConfig, BertEncoder
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

    Batch = dict[str, np.ndarray]

Base = Literal["bf16", "nf4", "int4", "int8", "fp8"]
"""What the kernels of a base lie in: as they are, or a format of `dora_jax.quantize`."""

LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=11008,
)
"""LLaMA-7B (arXiv 2302.13971)."""

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
"""SmolLM2-135M (arXiv 2502.02737)."""

MINILM = BertConfig(
    hidden_size=384,
    num_hidden_layers=6,
    intermediate_size=1536,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
"""all-MiniLM-L6-v2 (arXiv 2002.10957), without dropout."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to train or to run, and its batch.

    Attributes:
        title: The name in tables.
        build: Makes the model with random weights.
        batch: Arrays whose leading axis is the batch.
        outputs: The function of an inference call, `outputs(model, batch)`.
        loss: The mean loss of a batch, a scalar.
        adapter: The layers that are adapted, and the sizes of the adapters.
        tokens: Number of tokens in a batch, the rows of the kernels' inputs.
        shape: The sizes, from which PEFT builds the same model.
        dtype: Dtype of the parameters and the products.
    """

    title: str
    build: Callable[[], nnx.Module]
    batch: Batch
    outputs: Callable[[Any, Any], Array]
    loss: Callable[[Any, Any], Float[Array, ""]]
    adapter: Adapter
    tokens: int
    shape: Any
    dtype: str = "float32"

    def abstract(self, base: Base = "bf16") -> nnx.Module:
        """Returns the model with shapes instead of arrays.

        Args:
            base: Format of the kernels that are adapted; `"bf16"` leaves them in `dtype`.
        """
        model = nnx.eval_shape(self.build)
        if base == "bf16":
            return model
        return dora.quantize(model, base, target_modules=self.adapter.targets)


@dataclasses.dataclass(frozen=True)
class MLPShape:
    """Sizes of an `MLP` with `depth` square layers of `width` features."""

    width: int = 1024
    depth: int = 4


class MLP(nnx.Module):
    """Square linear layers with a ReLU between them."""

    def __init__(self, shape: MLPShape, *, rngs: nnx.Rngs) -> None:
        width = shape.width
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(shape.depth)])

    def __call__(self, x: Float[Array, "token feature"]) -> Float[Array, "token feature"]:
        """Applies the layers."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def mlp(*, tokens: int, rank: int = 16, shape: MLPShape | None = None) -> Case:
    """Returns a multilayer perceptron with a squared error. Every layer is adapted."""
    shape = shape or MLPShape()
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((tokens, shape.width), np.float32) for _ in range(2))
    return Case(
        title=f"MLP {shape.depth} x {shape.width}, {tokens} tokens, r {rank}",
        build=lambda: MLP(shape, rngs=nnx.Rngs(0)),
        batch={"x": x, "y": y},
        outputs=lambda model, batch: model(batch["x"]),
        loss=lambda model, batch: jnp.mean(jnp.square(model(batch["x"]) - batch["y"])),
        adapter=Adapter(r"layers\.\d+", rank, alpha=2.0 * rank),
        tokens=tokens,
        shape=shape,
    )


def bert(
    *,
    texts: int = 32,
    length: int = 32,
    rank: int = 8,
    shape: BertConfig = MINILM,
) -> Case:
    """Returns a BERT encoder with a squared error of the mean hidden state.

    Every linear layer is adapted.
    """
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(1, shape.vocab_size, (texts, length), dtype=np.int32),
        "target": rng.standard_normal((texts, shape.hidden_size), np.float32),
    }

    def loss(model: Any, batch: Any) -> Float[Array, ""]:
        hidden = model(batch["input_ids"])
        return jnp.mean(jnp.square(jnp.mean(hidden, axis=1) - batch["target"]))

    return Case(
        title=f"BERT {shape.num_hidden_layers} x {shape.hidden_size}, {texts} x {length} tokens, "
        f"r {rank}",
        build=lambda: BertEncoder(shape, rngs=nnx.Rngs(0)),
        batch=batch,
        outputs=lambda model, batch: model(batch["input_ids"]),
        loss=loss,
        adapter=Adapter(r"layers\..*", rank, alpha=2.0 * rank),
        tokens=texts * length,
        shape=shape,
    )


def llama(
    *,
    shape: LlamaConfig,
    texts: int = 1,
    length: int = 512,
    rank: int = 16,
    dtype: DTypeLike = jnp.float32,
    scan_layers: bool = False,
    remat: bool | Callable[..., bool] = False,
) -> Case:
    """Returns a LLaMA decoder. The seven projections of each layer are adapted."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (texts, length), dtype=np.int32)

    def loss(model: Any, batch: Any) -> Float[Array, ""]:
        ids = batch["input_ids"]
        logits = model(ids).astype(jnp.float32)[:, :-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]))

    return Case(
        title=f"LLaMA {shape.num_hidden_layers} x {shape.hidden_size}, {texts} x {length} tokens, "
        f"r {rank}, {jnp.dtype(dtype).name}",
        build=functools.partial(_build_llama, shape, dtype, scan_layers=scan_layers, remat=remat),
        batch={"input_ids": tokens},
        outputs=lambda model, batch: model(batch["input_ids"]),
        loss=loss,
        adapter=Adapter(r"layers\..*_proj", rank, alpha=2.0 * rank),
        tokens=texts * length,
        shape=shape,
        dtype=jnp.dtype(dtype).name,
    )


def _build_llama(shape: LlamaConfig, dtype: DTypeLike, **switches: Any) -> Llama:
    return Llama(shape, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **switches)


@dataclasses.dataclass(frozen=True)
class BlocksShape(LlamaConfig):
    """LLaMA blocks without the output projection."""


def blocks(shape: BlocksShape, *, tokens: int, rank: int, dtype: DTypeLike) -> Case:
    """Returns blocks of a LLaMA decoder and one text. The loss is a squared error of its output.

    Without the output projection, which nobody adapts, a step is the work of the adapted layers.
    """
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(0, shape.vocab_size, (1, tokens), dtype=np.int32),
        "target": rng.standard_normal((1, tokens, shape.hidden_size), np.float32),
    }

    def loss(model: Any, batch: Any) -> Float[Array, ""]:
        hidden = model.hidden_states(batch["input_ids"]).astype(jnp.float32)
        return jnp.mean(jnp.square(hidden - batch["target"]))

    return Case(
        title=f"LLaMA blocks {shape.num_hidden_layers} x {shape.hidden_size}, {tokens} tokens, "
        f"r {rank}, {jnp.dtype(dtype).name}",
        build=functools.partial(_build_llama, shape, dtype),
        batch=batch,
        outputs=lambda model, batch: model.hidden_states(batch["input_ids"]),
        loss=loss,
        adapter=Adapter(r"layers\..*_proj", rank, alpha=2.0 * rank),
        tokens=tokens,
        shape=shape,
        dtype=jnp.dtype(dtype).name,
    )


def _llama_7b() -> Case:
    """Returns two blocks of LLaMA-7B. On a CPU they have a quarter of its width."""
    on_cpu = jax.default_backend() == "cpu"
    sizes: dict[str, Any] = {"num_hidden_layers": 2}
    if on_cpu:
        sizes |= {"vocab_size": 4000, "hidden_size": 1024, "num_attention_heads": 8}
        sizes |= {"intermediate_size": 2752}
    shape = dataclasses.replace(LLAMA_7B, **sizes)
    if on_cpu:
        return llama(shape=shape)
    return llama(shape=shape, length=2048, rank=32, dtype=jnp.bfloat16)


CASES: dict[str, Callable[[], Case]] = {
    "mlp-512": lambda: mlp(tokens=512),
    "mlp-2048": lambda: mlp(tokens=2048),
    "minilm": bert,
    "llama-7b": _llama_7b,
    "llama-7b-full-width": lambda: llama(
        shape=dataclasses.replace(LLAMA_7B, num_hidden_layers=1), length=2048, rank=32
    ),
    "smollm2": lambda: llama(shape=SMOLLM2_135M, length=256),
}
"""The cases by name, for the option `--cases`."""
