"""A task that trains in a second: labels that depend on the words, and a model of two layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks.task import Examples, Task
from experiments.tasks.text import TokenizedText
from tests.experiments.tiny_models import filled

WORDS, LENGTH, FEATURES = 30, 6, 8


class BagOfWords(nnx.Module):
    """The mean embedding of a text, a hidden layer, dropout, and a head named `classifier`."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(WORDS, FEATURES, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)
        self.classifier = nnx.Linear(FEATURES, 2, rngs=rngs)

    def __call__(self, input_ids, attention_mask):
        x = jnp.mean(self.embed(input_ids), axis=1, where=attention_mask[..., None] != 0)
        return self.classifier(self.dropout(jax.nn.relu(self.hidden(x))))


@dataclasses.dataclass(frozen=True)
class TinyTask(Task):
    def model(self, seed):
        return filled(lambda: BagOfWords(rngs=nnx.Rngs(0)), seed=seed)


def examples(count: int, seed: int) -> Examples:
    """Texts of random words; the label says whether the first word is in the vocabulary's half."""
    words = np.random.default_rng(seed).integers(0, WORDS, (count, LENGTH), dtype=np.int32)
    tokens = TokenizedText(words, np.ones_like(words), truncated=0)
    return Examples(tokens, (words[:, 0] < WORDS // 2).astype(np.int32))


def tiny_task(train: int = 21, validation: int = 12, test: int = 40) -> TinyTask:
    splits = (examples(count, seed) for seed, count in enumerate((train, validation, test)))
    return TinyTask(Path("tiny"), *splits, class_names=("no", "yes"), majority=0.5)
