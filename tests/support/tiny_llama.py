"""A LLaMA checkpoint that trains in seconds, whose tokens are characters."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

TINY_LLAMA = Path(__file__).parents[1] / "fixtures" / "llama" / "llama3"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,?:_/#'$-"


def write_tiny_llama(folder: Path) -> Path:
    """Writes a random LLaMA of two layers, with a tokenizer for its 64 tokens; returns its folder.

    Upper-case letters become lower-case ones, and other characters the unknown token.
    """
    folder.mkdir(exist_ok=True)
    for file in (TINY_LLAMA / "config.json", *TINY_LLAMA.glob("model*")):
        shutil.copy(file, folder)
    words = ["<unk>", "</s>", *_CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
