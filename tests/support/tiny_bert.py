"""A BERT checkpoint that trains in seconds."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file
from tokenizers.implementations import BertWordPieceTokenizer

from experiments.tasks.download import sarcasm_file
from experiments.tasks.sarcasm import load_sarcasm

TINY_BERT = Path(__file__).parents[1] / "fixtures" / "bert" / "bert_tiny"


def write_tiny_bert(folder: Path) -> Path:
    """Writes a random BERT of one layer, with a tokenizer for its 100 tokens; returns its folder.

    Raises:
      DownloadError: the texts for the tokenizer are not in the cache, and there is no network.
    """
    folder.mkdir(exist_ok=True)
    config = json.loads((TINY_BERT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(TINY_BERT / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layer.1." not in name}
    save_file(kept, folder / "model.safetensors")
    tokenizer = BertWordPieceTokenizer()
    texts = load_sarcasm(sarcasm_file()).train.texts
    tokenizer.train_from_iterator(texts, vocab_size=100, limit_alphabet=40, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
