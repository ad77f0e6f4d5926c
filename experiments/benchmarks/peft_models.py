"""The cases in torch, before they are adapted: a model, its adapted layers, and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.cases import BlocksShape, MLPShape
from experiments.models.bert import BertConfig
from experiments.models.llama_config import LlamaConfig

if TYPE_CHECKING:
    from experiments.benchmarks.cases import Case


def _mlp(case: Case) -> tuple[Any, str, Callable[[Any, Any], Any]]:
    import torch

    shape = case.shape
    layers: list[Any] = []
    for _ in range(shape.depth):
        layers += [torch.nn.Linear(shape.width, shape.width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    return (
        model,
        r"\d*[02468]",
        lambda model, batch: torch.nn.functional.mse_loss(model(batch["x"]), batch["y"]),
    )


def _bert(case: Case) -> tuple[Any, str, Callable[[Any, Any], Any]]:
    import torch
    import transformers

    config = transformers.BertConfig(**_fields(case.shape))
    model = transformers.BertModel(config, add_pooling_layer=False)

    def loss(model: Any, batch: Any) -> Any:
        hidden = model(input_ids=batch["input_ids"].long()).last_hidden_state
        return torch.nn.functional.mse_loss(hidden.mean(1), batch["target"])

    return model, r"encoder\.layer\..*\.(query|key|value|dense)", loss


def _llama(case: Case) -> tuple[Any, str, Callable[[Any, Any], Any]]:
    import torch
    import transformers

    config = transformers.LlamaConfig(**_fields(case.shape))
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, case.dtype))

    def loss(model: Any, batch: Any) -> Any:
        ids = batch["input_ids"].long()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return model, r".*_proj", loss


def _blocks(case: Case) -> tuple[Any, str, Callable[[Any, Any], Any]]:
    import torch
    import transformers

    config = transformers.LlamaConfig(**_fields(case.shape), attn_implementation="sdpa")
    model = transformers.LlamaModel(config).to(getattr(torch, case.dtype))

    def loss(model: Any, batch: Any) -> Any:
        hidden = model(input_ids=batch["input_ids"].long(), use_cache=False).last_hidden_state
        return torch.nn.functional.mse_loss(hidden.float(), batch["target"])

    return model, r".*_proj", loss


def _fields(shape: Any) -> dict[str, Any]:
    """Returns the fields of a configuration; transformers has the same names."""
    fields = dataclasses.asdict(shape)
    del fields["model_type"]  # transformers has it in the class
    return fields


BUILDERS: dict[type, Callable[[Case], tuple[Any, str, Callable[[Any, Any], Any]]]] = {
    MLPShape: _mlp,
    BertConfig: _bert,
    LlamaConfig: _llama,
    BlocksShape: _blocks,
}
"""What makes the torch model of a case, by the class of its sizes."""
