"""Training steps and forward passes in PEFT on torch: the same shapes, batch and device.

A base in bfloat16 runs under `torch.autocast`, as in the usual trainers: otherwise products with
PEFT's float32 adapters are in float32. On a GPU the optimiser is torch's fused AdamW.

Only this module needs torch, PEFT and transformers. The extra `parity` installs them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from experiments.benchmarks import peft_models
from experiments.benchmarks.steps import LEARNING_RATE

if TYPE_CHECKING:
    from experiments.benchmarks.cases import Case

METHODS = ("lora", "dora")
_TITLES = {"lora": "LoRA", "dora": "DoRA"}


def check_installed() -> None:
    """Raises SystemExit if torch, PEFT or transformers is not installed."""
    for package in ("torch", "peft", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(
                f"{package} is not installed: --peer peft needs the extra `parity`, "
                "pip install -e '.[experiments,parity]'"
            )


class TorchCall:
    """Work of a PEFT model on one batch.

    Args:
        case: The model, its batch and its adapters.
        method: One of `METHODS`.
        title: The name in tables.
    """

    def __init__(self, case: Case, method: str, title: str) -> None:
        self.title = title
        self.device = torch_device()
        self.model, self._loss = _adapted(case, method, self.device)
        self._batch = _on(self.device, case.batch)
        self._precision = _autocast(case, self.device)

    @property
    def argument_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def loss(self) -> Any:
        """Returns the loss of the batch."""
        with self._precision():
            return self._loss(self.model, self._batch)

    def warm_up(self) -> float:
        """Makes the first call, which compiles what is compiled, and returns its seconds."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def __call__(self) -> Any:
        """Does the work, and waits for it."""
        raise NotImplementedError

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


class TorchStep(TorchCall):
    """A function that takes the next training steps of a PEFT model.

    Args:
        case, method: See `TorchCall`.
        steps: Number of steps that a call takes before it waits.
        compile_model: Whether `torch.compile` compiles the model.

    Attributes:
        trainable_parameters: Number of trained parameters.
    """

    def __init__(
        self, case: Case, method: str, *, steps: int = 1, compile_model: bool = False
    ) -> None:
        import torch

        compiled = ", torch.compile" if compile_model else ""
        super().__init__(case, method, f"PEFT, {_TITLES[method]}{compiled}")
        self._trainable = [p for p in self.model.train().parameters() if p.requires_grad]
        if compile_model:
            self.model = torch.compile(self.model)
        self._optimizer = torch.optim.AdamW(
            self._trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=self.device == "cuda"
        )
        self._steps = steps
        self.trainable_parameters = sum(p.numel() for p in self._trainable)

    @property
    def argument_bytes(self) -> int:
        """Bytes of the parameters and of the moments."""
        return super().argument_bytes + 8 * self.trainable_parameters

    def __call__(self) -> Any:
        """Takes the steps, waits for them, and returns the loss before the last one."""
        import torch

        for _ in range(self._steps):
            self._optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._trainable, 1.0)
            self._optimizer.step()
        self._wait()
        return loss.detach()


class TorchForward(TorchCall):
    """A forward pass of a PEFT model.

    Args:
        case, method: See `TorchCall`.
        cached: Whether PEFT keeps the norms, and a matrix of each adapted kernel's size.
        merged: Whether the adapters are merged into the kernels.
    """

    def __init__(
        self, case: Case, method: str, *, cached: bool = False, merged: bool = False
    ) -> None:
        kept = ", cached" if cached else ", merged" if merged else ""
        super().__init__(case, method, f"PEFT, {_TITLES[method]}{kept}")
        self.model = (self.model.merge_and_unload() if merged else self.model).eval()
        self._cached = cached

    def __call__(self) -> Any:
        """Makes the forward pass, and waits for it."""
        import torch
        from peft.helpers import DoraCaching

        with torch.no_grad(), DoraCaching(enabled=self._cached):
            loss = self.loss()
        self._wait()
        return loss


def training_steps(case: Case, steps: int = 1) -> dict[str, TorchStep]:
    """Returns training steps of PEFT's LoRA and DoRA, `peft-lora` and `peft-dora`.

    Torch runs on the same kind of device as JAX. On a CPU it has a thread for each core.

    Raises:
        SystemExit: JAX runs on a device that torch cannot use.
    """
    return {f"peft-{method}": TorchStep(case, method, steps=steps) for method in METHODS}


def inference_calls(case: Case) -> dict[str, TorchForward]:
    """Returns forward passes of PEFT's LoRA and DoRA, and of DoRA with PEFT's cache, and merged."""
    return {
        "peft-lora": TorchForward(case, "lora"),
        "peft-dora": TorchForward(case, "dora"),
        "peft-dora-cached": TorchForward(case, "dora", cached=True),
        "peft-merged": TorchForward(case, "dora", merged=True),
    }


def temporary_bytes(call: Callable[[], Any]) -> int | None:
    """Returns the most that a call allocates beyond what is there, or None without a counter."""
    import torch

    if torch_device() != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return int(torch.cuda.max_memory_allocated() - before)


def torch_device() -> str:
    """Returns torch's name of the device that JAX runs on.

    Raises:
        SystemExit: JAX runs on a device that torch cannot use.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    backend = jax.default_backend()
    device = "cuda" if backend == "gpu" else backend
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise SystemExit(f"torch has no {backend}: run without --peer")
    return device


def _adapted(case: Case, method: str, device: str) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Returns the model with its adapters on the device, and its loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, targets, loss = peft_models.BUILDERS[type(case.shape)](case)
    config = LoraConfig(
        r=case.adapter.rank,
        lora_alpha=case.adapter.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        use_dora=method == "dora",
    )
    return get_peft_model(model.to(device), config), loss


def _on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(x).to(device) for name, x in batch.items()}


def _autocast(case: Case, device: str) -> Callable[[], Any]:
    """Returns what makes the context of a forward pass."""
    import torch

    if case.dtype == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device, getattr(torch, case.dtype))
