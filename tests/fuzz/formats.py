"""The folders that are damaged, how each is read, and what a right reading of it is.

A reading is right if it is that of the whole folder. Formats without a checksum of everything may
hold other numbers without a sign of it: then it must be what an independent reader finds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.adapters.trees import flatten
from dora_jax.checkpoint import read_adapters, save
from dora_jax.cli.inspect import inspect
from dora_jax.names import IDENTITY
from dora_jax.peft import read_adapters as read_peft
from dora_jax.peft import save_pretrained
from experiments.models.bert_config import BertConfig
from experiments.models.huggingface import load_bert, load_llama
from experiments.models.llama_config import LlamaConfig
from experiments.models.rope import RopeScaling
from tests.support.checkpoints import filled

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIG = dora.DoRAConfig(
    rank=2, alpha=8.0, target_modules=["up", "down"], rank_pattern={"down": 3}, use_rslora=True
)
Values = dict[str, Any]


class Model(nnx.Module):
    """Two layers to adapt."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(5, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of folder.

    Attributes:
      name: of the format.
      make: writes a whole folder.
      read: returns what the library reads from a folder, by name.
      independent: returns what another reader finds in it, by name; None if a checksum covers all.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Values]
    independent: Callable[[Path], Values] | None = None


@functools.cache
def base() -> Model:
    """Returns the model without adapters."""
    return filled(Model)


@functools.cache
def adapted() -> Model:
    """Returns the model with adapters as if trained."""
    model = dora.apply_dora(base(), CONFIG, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), dora.get_adapters(model))
    dora.set_adapters(model, jax.tree.map(lambda x: x.astype(np.float32), tree))
    return model


def arrays(tree: Any) -> Values:
    """Returns the arrays of a tree by dotted path."""
    return {".".join(path): np.asarray(x) for path, x in flatten(tree).items()}


def parameters(model: nnx.Module) -> Values:
    """Returns the parameters of a model by dotted path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}


def read_own(folder: Path) -> Values:
    saved = read_adapters(folder)
    loaded = dora.load(folder, base())
    records = {path: record.arrays() for path, record in saved.base.items()}
    kept = {f"base.{'.'.join(p)}.{n}": x for p, own in records.items() for n, x in own.items()}
    loaded_arrays = {f"loaded.{k}": x for k, x in arrays(dora.get_adapters(loaded)).items()}
    return arrays(saved.adapters) | kept | loaded_arrays | saved.config.to_dict()


def own_as_it_says(folder: Path) -> Values:
    """The whole folder's arrays, with the configuration that a signed manifest holds."""
    manifest = json.loads((folder / "metadata" / "metadata").read_text())
    fields = manifest["metadata"]["config"]
    return _WHOLE["own"] | dora.DoRAConfig(**fields).to_dict()


def read_peft_folder(folder: Path) -> Values:
    tree, config = read_peft(base(), folder, IDENTITY)
    inspect(folder)
    fields = config.to_dict()
    scaling = {path: config.layer_settings((path,)).scaling for path in ("up", "down")}
    return arrays(tree) | {"dropout": fields["dropout"], "decompose": fields["decompose"]} | scaling


def peft_as_it_says(folder: Path) -> Values:
    """What the two files of an adapter hold, by PEFT's definition."""
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    found: Values = {}
    for module in ("up", "down"):
        prefix = f"base_model.model.{module}."
        found[f"{module}.lora_a"] = tensors[f"{prefix}lora_A.weight"].T
        found[f"{module}.lora_b"] = tensors[f"{prefix}lora_B.weight"].T
        found[f"{module}.magnitude"] = tensors[f"{prefix}lora_magnitude_vector"]
        rank = len(tensors[f"{prefix}lora_A.weight"])
        alpha = fields["lora_alpha"]
        found[module] = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
    return found | {"dropout": fields.get("lora_dropout") or 0.0, "decompose": fields["use_dora"]}


def make_unsigned_peft(folder: Path) -> None:
    """Writes an adapter as PEFT does, without a checksum."""
    save_pretrained(adapted(), folder, IDENTITY)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def read_llama(folder: Path) -> Values:
    model = load_llama(folder)
    return parameters(model) | dataclasses.asdict(model.config)


def llama_as_it_says(folder: Path) -> Values:
    """The tensors and the fields of the files, under the model's names."""
    tensors = _tensors(folder)
    found = {
        name.removeprefix("model."): x.T if x.ndim > 1 and "embed" not in name else x
        for name, x in tensors.items()
    }
    renamed = {name: _flax_name(name) for name in found}
    return {renamed[name]: x for name, x in found.items()} | _fields("llama", folder)


def read_bert(folder: Path) -> Values:
    model = load_bert(folder)
    return parameters(model) | dataclasses.asdict(model.config)


def bert_as_it_says(folder: Path) -> Values:
    """The fields of the file; and the tensors that the whole folder's parameters came from."""
    stored = {bare(name): x for name, x in _tensors(folder).items()}
    found = {
        path: stored[name].T if path.endswith("kernel") else stored[name]
        for path, name in _bert_tensors().items()
    }
    return found | _fields("bert", folder)


def bare(name: str) -> str:
    """Returns a tensor's name without the prefix of a head, and with current names."""
    name = name.removeprefix("bert.").removeprefix("roberta.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("rNorm.beta", "rNorm.bias")


@functools.cache
def _bert_tensors() -> dict[str, str]:
    """Returns the tensor that holds each parameter of the encoder, found by its values."""
    stored = {bare(name): x for name, x in _tensors(FIXTURES / "bert" / "bert_tiny").items()}
    names: dict[str, str] = {}
    for path, value in parameters(load_bert(FIXTURES / "bert" / "bert_tiny")).items():
        x = value.T if path.endswith("kernel") else value
        same = [n for n, y in stored.items() if x.shape == y.shape and (x == y).all()]
        names[path] = next(name for name in same if name not in names.values())
    return names


def _tensors(folder: Path) -> Values:
    return {
        name: x
        for file in sorted(folder.glob("model*.safetensors"))
        for name, x in load_file(file).items()
    }


def _flax_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        return name
    kind = "embedding" if "embed" in module else "scale" if "norm" in module else "kernel"
    return f"{module}.{kind}"


def _fields(kind: str, folder: Path) -> Values:
    """The fields of the file; Hugging Face's defaults for those that it lacks."""
    defaults = {f.name: f.default for f in dataclasses.fields(_CONFIGS[kind])}
    stored = json.loads((folder / "config.json").read_text())
    fields = {
        name: stored[name] if stored.get(name) is not None else default
        for name, default in defaults.items()
    }
    if scaling := fields.get("rope_scaling"):
        names = [field.name for field in dataclasses.fields(RopeScaling)]
        original = {"original_max_position_embeddings": stored.get("max_position_embeddings")}
        fields["rope_scaling"] = {name: (original | scaling).get(name) for name in names}
    if kind == "llama":
        fields["sliding_window"] = None  # which a LLaMA does not have
    return fields


def copy_of(fixture: str) -> Callable[[Path], None]:
    """Returns a function that copies a fixture's folder."""
    source = FIXTURES / fixture

    def make(folder: Path) -> None:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("activations*"))

    return make


_FIXTURES = {"llama": "llama/llama3", "bert": "bert/bert_tiny"}
_WHOLE: dict[str, Values] = {}
_CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "bert": BertConfig}

FORMATS = [
    Format("own", lambda folder: save(folder, adapted(), CONFIG), read_own, own_as_it_says),
    Format(
        "peft",
        lambda folder: save_pretrained(adapted(), folder, IDENTITY) and None,
        read_peft_folder,
    ),
    Format("unsigned peft", make_unsigned_peft, read_peft_folder, peft_as_it_says),
    Format("llama", copy_of(_FIXTURES["llama"]), read_llama, llama_as_it_says),
    Format("bert", copy_of(_FIXTURES["bert"]), read_bert, bert_as_it_says),
]


def whole(kind: Format, folder: Path) -> Values:
    """Returns what is read from a whole folder."""
    _WHOLE[kind.name] = kind.read(folder)
    return _WHOLE[kind.name]
