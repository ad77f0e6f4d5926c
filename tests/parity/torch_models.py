"""Small torch models and the PEFT adapters put on them, for the fixtures and the live tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
}
LLAMA = {**SIZES, "vocab_size": 40, "num_key_value_heads": 2, "tie_word_embeddings": False}


class Convolutions(nn.Module):
    """Convolutions over one, two and three axes, and a layer on what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 5, (3, 2), stride=2, bias=False)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.head = nn.Linear(15, 3)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        """Takes channels last, as Flax does."""
        outputs = []
        for conv, x in ((self.conv1, x1), (self.conv2, x2), (self.conv3, x3)):
            y = torch.tanh(conv(x.movedim(-1, 1)))
            outputs.append(y.flatten(2).mean(-1))
        return self.head(torch.cat(outputs, -1))


class Tables(nn.Module):
    """An embedding, and GPT-2's layer, whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.c_fc = Conv1D(12, 8)
        self.head = nn.Linear(12, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.c_fc(self.wte(ids))))


class Attention(nn.Module):
    """Self-attention with flat projections, which Flax lays out as (in, heads, head_dim)."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in projections)
        weights = torch.softmax(q @ k.mT / 2, -1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


@dataclasses.dataclass(frozen=True)
class Case:
    """A base model, its inputs, and what PEFT does to it.

    Attributes:
      model: makes the base model.
      inputs: by the names of the model's arguments.
      lora: arguments of `peft.LoraConfig`.
    """

    model: Callable[[], nn.Module]
    inputs: Mapping[str, torch.Tensor]
    lora: Mapping[str, Any]


def _ids(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(3))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, vocab_size=40, num_labels=3)
    return transformers.BertForTokenClassification(config)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, attn_implementation="eager"
    )
    return transformers.GPT2LMHeadModel(config)


CASES = {
    # A new head, trained in full; one projection of another rank and alpha, one left out.
    "bert": Case(
        _bert,
        {"input_ids": _ids(40, 2, 7)},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query", "value", "attention.output.dense"],
            "exclude_modules": ["layer.1.attention.self.value"],
            "rank_pattern": {"layer.0.attention.self.value": 2},
            "alpha_pattern": {"layer.0.attention.self.value": 6},
            "modules_to_save": ["classifier"],
        },
    ),
    "llama": Case(
        _llama,
        {"input_ids": _ids(40, 2, 7)},
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": r".*\.(q_proj|k_proj|v_proj|up_proj)|lm_head",
        },
    ),
    # Some of the layers only: of a stack, some of its slices.
    "llama_some": Case(
        _llama,
        {"input_ids": _ids(40, 2, 7)},
        {"r": 2, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    # Plain LoRA.
    "llama_lora": Case(
        _llama,
        {"input_ids": _ids(40, 2, 7)},
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": False},
    ),
    "gpt2": Case(
        _gpt2,
        {"input_ids": _ids(40, 2, 7)},
        {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "convolutions": Case(
        Convolutions,
        {"x1": _normal(2, 7, 3), "x2": _normal(2, 8, 7, 3), "x3": _normal(2, 4, 3, 3, 2)},
        {"r": 2, "target_modules": ["conv1", "conv2", "conv3"]},
    ),
    "tables": Case(Tables, {"ids": _ids(20, 2, 5)}, {"r": 2, "target_modules": ["wte", "c_fc"]}),
    "attention": Case(
        Attention,
        {"x": _normal(2, 5, 8)},
        {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
}


def base_model(case: Case) -> nn.Module:
    """Returns the base model in float64, every parameter of a size that shows in the output."""
    model = case.model().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
            parameter.copy_(parameter.float())  # so that it is stored without loss
    return model


def adapted_model(case: Case, base: nn.Module) -> peft.PeftModel:
    """Returns the base with a PEFT adapter as training would leave it: far from its start."""
    model = peft.get_peft_model(base, peft.LoraConfig(**{"use_dora": True, **case.lora}))
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
            parameter.copy_(parameter.float())
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the logits, or what a model returns in their place."""
    dtype = next(model.parameters()).dtype
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    result = model(**cast)
    return getattr(result, "logits", result)


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Returns a loss with a gradient everywhere, the same as `tests.support.peft_models.loss`."""
    features = torch.arange(logits.shape[-1], dtype=logits.dtype)
    return ((logits - torch.sin(features)) ** 2).mean()


def gradients(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the gradients of the loss, by the key that PEFT gives the parameter in its file."""
    model.zero_grad()
    loss(outputs(model, inputs)).backward()
    return {file_key(name): p.grad.clone() for name, p in trainable(model).items()}


def file_key(name: str) -> str:
    """Returns the key of a parameter in PEFT's file."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("magnitude_vector.weight") else name


def train(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], steps: int, learning_rate: float
) -> list[float]:
    """Returns the losses before each step of AdamW, in place."""
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(outputs(model, inputs))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
