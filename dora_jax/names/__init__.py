"""Which Hugging Face tensor each parameter of a Flax model is.

A `NameMap` says it as data; maps for known architectures are here. Nothing here reads a file.
"""

from dora_jax.names.architectures import BERT, IDENTITY, LLAMA, NAME_MAPS, ROBERTA
from dora_jax.names.name_map import HFModule, NameMap
from dora_jax.names.torch_layout import Interleaved, NameMapError

__all__ = [
    "BERT",
    "IDENTITY",
    "LLAMA",
    "NAME_MAPS",
    "ROBERTA",
    "HFModule",
    "Interleaved",
    "NameMap",
    "NameMapError",
]
