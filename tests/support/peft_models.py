"""Flax twins of the torch models in `tests/parity/torch_models.py`, with their name maps."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file

import dora_jax as dora
from dora_jax import names, peft
from experiments.models.bert import BertConfig, BertEncoder
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "peft"
Arrays = Mapping[str, np.ndarray]

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


class TokenClassifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        config = BertConfig(
            **SIZES,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = BertEncoder(config, rngs=rngs)
        self.classifier = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, input_ids):
        return self.classifier(self.encoder(input_ids))


def llama(rngs: nnx.Rngs, **options: Any) -> Llama:
    return Llama(LlamaConfig(**SIZES, num_key_value_heads=2), rngs=rngs, **options)


class Convolutions(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 6, 3, padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(3, 5, (3, 2), strides=2, padding="VALID", use_bias=False, rngs=rngs)
        self.conv3 = nnx.Conv(2, 4, (2, 2, 2), padding="VALID", rngs=rngs)
        self.head = nnx.Linear(15, 3, rngs=rngs)

    def __call__(self, x1, x2, x3):
        outputs = []
        for conv, x in ((self.conv1, x1), (self.conv2, x2), (self.conv3, x3)):
            y = jnp.tanh(conv(x))
            outputs.append(y.mean(tuple(range(1, y.ndim - 1))))
        return self.head(jnp.concatenate(outputs, -1))


class LinenConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x1, x2, x3):
        convs = (
            nn.Conv(6, (3,), padding=1, name="conv1"),
            nn.Conv(5, (3, 2), strides=2, padding="VALID", use_bias=False, name="conv2"),
            nn.Conv(4, (2, 2, 2), padding="VALID", name="conv3"),
        )
        outputs = []
        for conv, x in zip(convs, (x1, x2, x3), strict=True):
            y = jnp.tanh(conv(x))
            outputs.append(y.mean(tuple(range(1, y.ndim - 1))))
        return nn.Dense(3, name="head")(jnp.concatenate(outputs, -1))


class Tables(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.wte = nnx.Embed(20, 8, rngs=rngs)
        self.c_fc = nnx.Linear(8, 12, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, ids):
        return self.head(jnp.tanh(self.c_fc(self.wte(ids))))


class LinenTables(nn.Module):
    @nn.compact
    def __call__(self, ids):
        y = nn.Dense(12, name="c_fc")(nn.Embed(20, 8, name="wte")(ids))
        return nn.Dense(4, name="head")(jnp.tanh(y))


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x)


SPLIT = dora.decomposition.KernelAxes((), (0,), (1, 2))
ATTENTION_AXES = {"query": SPLIT, "key": SPLIT, "value": SPLIT} | {
    "out": dora.decomposition.KernelAxes((), (0, 1), (2,))
}
ATTENTION_NAMES = names.NameMap(
    {f"attention.{n}": f"{n[0]}_proj" for n in ("query", "key", "value", "out")}
)
TABLES_NAMES = names.IDENTITY | {"c_fc": names.HFModule("c_fc", transposed=True)}


@dataclasses.dataclass(frozen=True)
class Twin:
    """A Flax model that computes the same as a torch model.

    Attributes:
      fixture: the case of the torch model.
      make: makes the model: an NNX one from `nnx.Rngs`, or a Linen module.
      names: the name map.
      axes: of kernels whose axes are flattened, by the end of their path.
    """

    fixture: str
    make: Callable[..., Any]
    names: names.NameMap = names.IDENTITY
    axes: Mapping[str, dora.decomposition.KernelAxes] = dataclasses.field(default_factory=dict)


TWINS = {
    "bert": Twin(
        "bert",
        TokenClassifier,
        names.BERT.inside("encoder", "bert") | {"classifier": "classifier"},
    ),
    **{
        name + suffix: Twin(name, make, names.LLAMA)
        for name in ("llama", "llama_some", "llama_lora")
        for suffix, make in (("", llama), ("_stacked", lambda rngs: llama(rngs, scan_layers=True)))
    },
    "convolutions": Twin("convolutions", Convolutions),
    "convolutions_linen": Twin("convolutions", LinenConvolutions),
    "tables": Twin("tables", Tables, TABLES_NAMES),
    "tables_linen": Twin("tables", LinenTables, TABLES_NAMES),
    "attention": Twin("attention", Attention, ATTENTION_NAMES, ATTENTION_AXES),
    "attention_linen": Twin("attention", LinenAttention, ATTENTION_NAMES, ATTENTION_AXES),
}


@dataclasses.dataclass
class Built:
    """A Flax model with the base weights of a torch model.

    Attributes:
      model: an NNX model, or a Linen module.
      params: of a Linen module.
      inputs: positional arguments of a call.
      twin: the twin that it was made from.
    """

    model: Any
    params: Any
    inputs: tuple[jax.Array, ...]
    twin: Twin

    @property
    def linen(self) -> dict[str, Any]:
        """The further arguments that a Linen module needs."""
        return {} if self.params is None else {"params": self.params, "inputs": self.inputs}

    def load(self, folder):
        """Returns a model with the adapter of a folder."""
        return self._adapted(
            peft.load_pretrained(self.model, folder, self.twin.names, **self.linen)
        )

    def read(self, folder):
        """Returns the adapter tree and the configuration of a folder."""
        return peft.read_adapters(self.model, folder, self.twin.names, **self.linen)

    def abstract(self, config):
        """Returns an adapted model without values, which has its layers and shapes only."""
        plain = dora.model.Plain(None, self.params, self.linen.get("inputs"))
        model = dora.model.adapt_abstract(self.model, config, plain)
        return Adapted(model, None, self.params, self)

    def _adapted(self, loaded):
        if self.params is None:
            return Adapted(loaded, dora.get_adapters(loaded), None, self)
        return Adapted(*loaded, self.params, self)


@dataclasses.dataclass
class Adapted:
    """A model with an adapter; `tree` is the adapter tree."""

    model: Any
    tree: Any
    params: Any
    built: Built

    def __call__(self, tree=None):
        """Returns the outputs, with this adapter tree if there is one."""
        return self._jitted(self.tree if tree is None else tree)

    @functools.cached_property
    def _jitted(self):
        # One program, since every operation by itself would take twice as long to compile.
        if self.params is not None:
            variables = {"params": self.params}
            return jax.jit(
                lambda tree: self.model.apply({**variables, "dora": tree}, *self.built.inputs)
            )
        return jax.jit(lambda tree: self.with_tree(tree).model(*self.built.inputs))

    def with_tree(self, tree):
        """Returns the same with another adapter tree."""
        if self.params is None:
            graphdef, state = nnx.split(self.model)
            model = nnx.merge(graphdef, state, copy=True)
            dora.set_adapters(model, tree)
            return Adapted(model, tree, None, self.built)
        return dataclasses.replace(self, tree=tree)

    def save(self, folder, **options):
        """Writes a PEFT folder; `options` are those of `save_pretrained`."""
        options = {"adapters": self.tree, **options}
        return peft.save_pretrained(self.model, folder, self.built.twin.names, **options)


def reference(fixture: str, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the stored tensors whose names start with a prefix, without it."""
    tensors = load_file(FIXTURES / fixture / "reference.safetensors")
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build(twin: Twin, base: Arrays, inputs: Mapping[str, np.ndarray]) -> Built:
    """Returns the Flax model with the base weights of the torch model."""
    arguments = tuple(jnp.asarray(x) for x in inputs.values())

    def read(path: str, shape: tuple[int, ...]) -> jax.Array:
        axes = twin.axes.get(path.split(".")[-2]) if path.endswith("kernel") else None
        return jnp.asarray(twin.names.from_hf(path, shape, base.__getitem__, axes))

    if isinstance(twin.make, type) and issubclass(twin.make, nn.Module):
        module = twin.make()
        shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: read(".".join(k.key for k in path), x.shape), shapes
        )
        return Built(module, params, arguments, twin)
    model = nnx.eval_shape(lambda: twin.make(rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(read(".".join(map(str, path)), variable.shape))
    return Built(model, None, arguments, twin)


def loss(logits: jax.Array) -> jax.Array:
    """Returns a loss with a gradient everywhere, the same as in `torch_models`."""
    return ((logits - jnp.sin(jnp.arange(logits.shape[-1]))) ** 2).mean()
