"""Adapted models for the tests of adapter trees, their operations under jit and built once."""

from __future__ import annotations

import dataclasses
import functools

import jax

import dora_jax as dora
from tests.support import operations
from tests.support.models import random_adapters

CONFIG = dora.DoRAConfig(rank=4)
# All layers of one shape, so that one compiled program starts them all.
WIDTHS = (16, 16, 16)


def chain_with(front_end, **fields):
    """Two dense layers, adapted with rank 4 and other fields of the configuration."""
    return _built(front_end, "chain", dora.DoRAConfig(**{"rank": 4, **fields}))


def build(front_end, kind, config=CONFIG):
    """A chain of dense layers, or a stack of three in a scan."""
    return _built(front_end, kind, config)


def several(model, number=3):
    """Returns adapters of a model, each far from its start and from the others."""
    return [random_adapters(model.adapters, seed) for seed in range(number)]


@functools.cache
def _built(front_end, kind, config):
    if kind == "chain":
        model = operations.chain(front_end, config, WIDTHS)
    else:
        model = operations.stack(front_end, config)
    names = ("base", "apply", "precompute_scales", "disabled", "mixed", "merge")
    return dataclasses.replace(model, **{name: jax.jit(getattr(model, name)) for name in names})
