"""How an experiment runs: devices, precision, memory and what is recorded of its speed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.models.remat import REMAT, Remat
from experiments.trainer.compile_cache import use_compile_cache
from experiments.trainer.mesh import make_mesh, parse_mesh


class SettingsError(ValueError):
    """Options that do not go together, or that a model does not have."""


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """How an experiment runs. Every script has these options.

    Example:
        >>> TrainerSettings(mesh="fsdp=1").device_mesh() is None
        True
        >>> TrainerSettings(dtype="bfloat16").switches(lambda dtype: None)
        {'dtype': dtype(bfloat16)}
    """

    # Devices by name, such as fsdp=8,tensor=2. The axes are data, fsdp and tensor. The default is
    # one device.
    mesh: str = ""
    # Number of equal parts of a batch that are computed one after the other, to need less memory.
    microbatches: int = 1
    # Dtype of the products in the base model. Adapters and losses are float32 in any case.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # What the backward pass keeps of each layer, where the model has a choice; it computes the rest
    # again. With none it keeps everything, with full only what a layer starts from.
    remat: Remat = "none"
    # Folder for a trace of three steps after the warm-up, which XProf and Perfetto show.
    profile: Path | None = None
    # Folder of the compiled programs, for later runs; off keeps none. The default is in the user's
    # cache folder.
    compile_cache: Literal["off"] | Path | None = None

    def __post_init__(self) -> None:
        parse_mesh(self.mesh)
        if self.microbatches < 1:
            raise SettingsError(f"microbatches must be at least 1, got {self.microbatches}")

    def device_mesh(self) -> jax.sharding.Mesh | None:
        """Returns the mesh of devices; None if it is one device.

        Raises:
            MeshError: There are not so many devices.
        """
        sizes = parse_mesh(self.mesh)
        return make_mesh(sizes) if max(sizes.values()) > 1 else None

    def switches(self, constructor: Callable[..., Any]) -> dict[str, Any]:
        """Returns keyword arguments for a function that makes a model: `dtype` and `remat`.

        Those at their default are left to the function.

        Raises:
            SettingsError: An option was chosen that the function does not have.
        """
        chosen: dict[str, Any] = {}
        if self.dtype != "float32":
            chosen["dtype"] = jnp.dtype(self.dtype)
        if self.remat != "none":
            chosen["remat"] = REMAT[self.remat]
        # The metaclass of NNX modules hides the signature of their classes.
        makes: Any = constructor
        if isinstance(makes, type):
            makes = makes.__init__  # type: ignore[misc]
        if unknown := sorted(chosen.keys() - inspect.signature(makes).parameters.keys()):
            raise SettingsError(
                f"--{unknown[0]}: the model of this experiment has no such option. Leave it out"
            )
        return chosen

    @property
    def changes_results(self) -> dict[str, Any]:
        """The settings on which the numbers of a run depend, beyond rounding."""
        return {"microbatches": self.microbatches, "dtype": self.dtype}

    def set_up(self) -> None:
        """Prepares this process: call it before anything is compiled."""
        use_compile_cache(self.compile_cache)
