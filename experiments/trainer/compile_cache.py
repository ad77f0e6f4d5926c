"""Compiled programs on disk, so that a further run of an experiment starts without compiling."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Literal

import jax

from experiments.tasks.download import cache_folder


def use_compile_cache(folder: Path | Literal["off"] | None) -> None:
    """Makes JAX keep compiled programs in a folder, and look for them there.

    Args:
        folder: None is a folder in the user's cache, or the one that JAX already has, such as that
            of the environment variable `JAX_COMPILATION_CACHE_DIR`. `"off"` keeps none.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder is not None or not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        chosen = folder or cache_folder() / "compiled" / _processor()
        jax.config.update("jax_compilation_cache_dir", str(chosen))


def _processor() -> str:
    """Returns a name for the processor: a program for one may not run on another.

    A home folder may serve several machines.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().partition("flags")[2].partition("\n")[0] if cpuinfo.exists() else ""
    name = f"{platform.machine()} {platform.processor()} {flags}"
    return hashlib.sha256(name.encode()).hexdigest()[:12]
