"""Hugging Face checkpoint folders: `config.json` and safetensors, in one file or in several.

The same for both front ends, with a `dora_jax.names.NameMap` that says which tensor is which
parameter.
"""

from dora_jax.errors import CheckpointError
from dora_jax.huggingface.loading import load_checkpoint
from dora_jax.huggingface.saving import save_checkpoint

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]
