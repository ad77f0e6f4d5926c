"""Training steps in PEFT on torch, with the same shapes, batch, optimiser and device.

Only this module needs torch, PEFT and transformers. The extra `parity` installs them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from experiments.benchmarks.cases import MLPShape
from experiments.benchmarks.steps import LEARNING_RATE
from experiments.models.bert import BertConfig
from experiments.models.llama_config import LlamaConfig

if TYPE_CHECKING:
    from experiments.benchmarks.cases import Case

METHODS = ("lora", "dora")


def check_installed() -> None:
    """Raises SystemExit if torch, PEFT or transformers is not installed."""
    for package in ("torch", "peft", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(
                f"{package} is not installed: --peer peft needs the extra `parity`, "
                "pip install -e '.[experiments,parity]'"
            )


class TorchStep:
    """A function that takes the next training step of a PEFT model.

    Attributes:
        trainable_parameters: Number of trained parameters.
    """

    def __init__(self, case: Case, method: str, device: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model, targets, self._loss = _BUILDERS[type(case.shape)](case)
        config = LoraConfig(
            r=case.adapter.rank,
            lora_alpha=case.adapter.alpha,
            lora_dropout=0.0,
            target_modules=targets,
            use_dora=method == "dora",
        )
        self._model = get_peft_model(model, config).to(device).train()
        self._trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trainable, lr=LEARNING_RATE, weight_decay=0.0)
        self._batch = {name: torch.from_numpy(x).to(device) for name, x in case.batch.items()}
        self.trainable_parameters = sum(p.numel() for p in self._trainable)

    def __call__(self) -> Any:
        """Takes a step, waits for it, and returns the loss before it."""
        import torch

        self._optimizer.zero_grad()
        loss = self._loss(self._model, self._batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trainable, 1.0)
        self._optimizer.step()
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()


def training_steps(case: Case) -> dict[str, TorchStep]:
    """Returns a training step of PEFT's LoRA and DoRA, `peft-lora` and `peft-dora`.

    Torch runs on the same kind of device as JAX. On a CPU it has a thread for each core.

    Raises:
        SystemExit: JAX runs on a device that torch cannot use.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    backend = jax.default_backend()
    device = "cuda" if backend == "gpu" else backend
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise SystemExit(f"torch has no {backend}: run without --peer")
    return {f"peft-{method}": TorchStep(case, method, device) for method in METHODS}


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


def _fields(shape: Any) -> dict[str, Any]:
    """Returns the fields of a configuration; transformers has the same names."""
    fields = dataclasses.asdict(shape)
    del fields["model_type"]  # transformers has it in the class
    return fields


_BUILDERS: dict[type, Callable[[Case], tuple[Any, str, Callable[[Any, Any], Any]]]] = {
    MLPShape: _mlp,
    BertConfig: _bert,
    LlamaConfig: _llama,
}
