"""Hugging Face checkpoint folders: `config.json` and safetensors, in one file or in several.

They are read into models of either front end and written from them. A `dora_jax.names.NameMap` says
which tensor each parameter is.
"""

from dora_jax.errors import CheckpointError
from dora_jax.huggingface.loading import TensorRules, load_checkpoint
from dora_jax.huggingface.saving import SaveOptions, save_checkpoint

__all__ = ["CheckpointError", "SaveOptions", "TensorRules", "load_checkpoint", "save_checkpoint"]
