"""Hugging Face PEFT adapters (`adapter_config.json`, `adapter_model.safetensors`), both ways."""

from dora_jax.peft.config import PeftConfig, PeftError
from dora_jax.peft.loading import load_pretrained, read_adapters
from dora_jax.peft.saving import save_pretrained

__all__ = ["PeftConfig", "PeftError", "load_pretrained", "read_adapters", "save_pretrained"]
