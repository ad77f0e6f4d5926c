"""Compilation that is quick rather than good, for laws about numbers within a bound.

Laws about bits or about programs are compiled as users have it: with `jax.jit`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
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


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit`, compiled quickly; inside of another traced function, `jax.jit` as it is.

    XLA takes compiler options for a whole program only.
    """
    quick = jax.jit(function, compiler_options=COMPILER_OPTIONS, **options)
    plain = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs)))
        return (plain if traced else quick)(*args, **kwargs)

    return call


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
