"""The task that quickstart and compare share: sarcasm in headlines, on a pretrained MiniLM."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from flax import nnx

from experiments.tasks.download import minilm_folder, sarcasm_file
from experiments.tasks.sarcasm import Split, load_sarcasm
from experiments.tasks.text import TokenizedText, tokenize
from experiments.models.bert import BertClassifier
from experiments.models.huggingface import load_bert


@dataclasses.dataclass(frozen=True)
class Examples:
    """The tokenised texts of one split, and their labels int32 (text,)."""

    tokens: TokenizedText
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Examples:
        """The first `count` examples; all of them if there are fewer."""
        tokens = TokenizedText(
            self.tokens.input_ids[:count], self.tokens.attention_mask[:count], truncated=0
        )
        return Examples(tokens, self.labels[:count])


@dataclasses.dataclass(frozen=True)
class Task:
    """A pretrained encoder and the texts to adapt it to.

    Attributes:
        checkpoint: The encoder's Hugging Face folder.
        train: What is trained on.
        validation: What choices are made on.
        test: What is looked at once, at the end.
        class_names: By label.
        majority: Test accuracy of always answering the most frequent class.
    """

    checkpoint: Path
    train: Examples
    validation: Examples
    test: Examples
    class_names: tuple[str, ...]
    majority: float

    def model(self, seed: int) -> BertClassifier:
        """The pretrained encoder with a new head, drawn from the seed.

        Without dropout: a run of a few hundred steps does not overfit, and drawing the masks makes
        a step on a CPU 1.4 times as long.
        """
        rngs = nnx.Rngs(seed)
        encoder = load_bert(self.checkpoint, dropout_rate=0.0, rngs=rngs)
        return BertClassifier(encoder, len(self.class_names), rngs=rngs)


def load_task(
    *, max_length: int, train: int = 4000, checkpoint: str | os.PathLike[str] | None = None
) -> Task:
    """Loads weights and texts, downloading them if they are not in the user's cache.

    Args:
        max_length: Tokens per text.
        train: How many of the 4,000 training texts to use. Validation (500) and test (2,000) are
            always the same texts.
        checkpoint: Another BERT or RoBERTa checkpoint folder; by default MiniLM.

    Raises:
        DownloadError: Without network, and not in the cache.
    """
    folder = Path(checkpoint) if checkpoint is not None else minilm_folder()
    splits = load_sarcasm(sarcasm_file())

    def examples(split: Split) -> Examples:
        return Examples(tokenize(split.texts, folder / "tokenizer.json", max_length), split.labels)

    return Task(
        checkpoint=folder,
        train=examples(splits.train).first(train),
        validation=examples(splits.validation),
        test=examples(splits.test),
        class_names=tuple(splits.class_names),
        majority=splits.test.majority_accuracy(),
    )
