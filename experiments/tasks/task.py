"""The task of quickstart and ablation: sarcasm in headlines, with a pretrained MiniLM."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.bert_classifier import BertClassifier
from experiments.models.huggingface import load_bert
from experiments.tasks.download import minilm_folder, sarcasm_file
from experiments.tasks.sarcasm import Split, load_sarcasm
from experiments.tasks.text import TokenizedText, tokenize

if TYPE_CHECKING:
    from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Examples:
    """The tokenised texts of one split, and their labels, int32 (text,)."""

    tokens: TokenizedText
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Examples:
        """Returns the first `count` examples, or all if there are fewer."""
        tokens = TokenizedText(
            self.tokens.input_ids[:count], self.tokens.attention_mask[:count], truncated=0
        )
        return Examples(tokens, self.labels[:count])


@dataclasses.dataclass(frozen=True)
class Task:
    """A pretrained encoder and the texts to adapt it to.

    Attributes:
        checkpoint: The Hugging Face folder of the encoder.
        train: Examples for training.
        validation: Examples for choices, such as that of the learning rate.
        test: Examples for the final figures, used once.
        class_names: The name of each label.
        majority: Test accuracy of the constant answer that is most often right.
    """

    checkpoint: Path
    train: Examples
    validation: Examples
    test: Examples
    class_names: tuple[str, ...]
    majority: float

    def model(self, seed: int, *, dtype: DTypeLike = jnp.float32) -> BertClassifier:
        """Returns the pretrained encoder with a new head, drawn with the seed.

        Parameters are float32, and products are computed in `dtype`.

        It has no dropout. A run of a few hundred steps does not overfit, and on a CPU a step with
        dropout takes 1.4 times as long.
        """
        rngs = nnx.Rngs(seed)
        encoder = load_bert(self.checkpoint, dtype=dtype, dropout_rate=0.0, rngs=rngs)
        return BertClassifier(encoder, len(self.class_names), rngs=rngs)


def load_task(
    *, max_length: int, train: int = 4000, checkpoint: str | os.PathLike[str] | None = None
) -> Task:
    """Loads the task. Downloads the weights and the texts if they are not in the user's cache.

    Args:
        max_length: Tokens per text.
        train: Number of training texts, up to 4,000. The validation texts (500) and the test texts
            (2,000) are always the same.
        checkpoint: Another BERT or RoBERTa checkpoint folder. The default is MiniLM.

    Raises:
        DownloadError: The files are not in the cache, and there is no network.
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
