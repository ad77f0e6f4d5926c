"""Hugging Face checkpoint folders: `config.json` and safetensors, in one file or in several.

They are read into models of either front end and written from them. A `dora_jax.names.NameMap` says
which tensor each parameter is.
"""

from dora_jax.disk.json_file import read_json
from dora_jax.errors import CheckpointError, MissingFileError
from dora_jax.huggingface.files import open_folder
from dora_jax.huggingface.loading import TensorRules, load_checkpoint
from dora_jax.huggingface.saving import SaveOptions, save_checkpoint

__all__ = [
    "CheckpointError",
    "MissingFileError",
    "SaveOptions",
    "TensorRules",
    "load_checkpoint",
    "open_folder",
    "read_json",
    "save_checkpoint",
]
