"""Which Hugging Face tensor each parameter of a Flax model is.

Maps for known architectures are here; `NameMap` makes one for any other. No file is read.
"""

from dora_jax.names.architectures import BERT, IDENTITY, LLAMA, NAME_MAPS, ROBERTA
from dora_jax.names.hf_module import HFModule
from dora_jax.names.name_map import NameMap
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
