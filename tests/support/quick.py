"""Compilation that is quick rather than good, for laws about numbers within a bound.

Laws about bits or about programs are compiled as users have it: with `jax.jit`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache


def _if_known(**options: Any) -> dict[str, Any]:
    """Returns the options, or none of them where this release of XLA refuses one."""
    try:
        jax.jit(jnp.negative, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return {}
    return options


# Three to four times faster to compile.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # Newer releases have one code generator for CPUs, so that there is nothing to choose.
    **_if_known(xla_cpu_use_fusion_emitters=False),
}

quick_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Within it programs are compiled, not read from the folder that keeps them.

    For tests that look at a program.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
