"""Generated answers to prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.language.answers import bucket
from experiments.models.generation import generate, left_padded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from experiments.models.llama import Llama


def answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Returns what a decoder continues each prompt with, taking the most likely token each time.

    Args:
        model: Fastest merged, or with precomputed scales.
        tokenizer: Encodes the prompts and decodes the answers.
        prompts: In any order: those of similar lengths share a batch.
        batch_size: Prompts of a batch.
        max_new_tokens: The most tokens of an answer.
        end_ids: Token ids that end an answer.
        progress: Called with the number of prompts that are done since the last call.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    lengths = [bucket(len(ids)) for ids in encoded]
    texts = [""] * len(prompts)
    for length in sorted(set(lengths)):
        same = [number for number, other in enumerate(lengths) if other == length]
        for start in range(0, len(same), batch_size):
            group = same[start : start + batch_size]
            filled = group + group[:1] * (batch_size - len(group))
            ids, mask = left_padded([encoded[number] for number in filled], length)
            found = generate(model, ids, mask, max_new_tokens=max_new_tokens, end_ids=end_ids)
            tokens, counts = np.asarray(found.tokens), np.asarray(found.lengths)
            for row, number in enumerate(group):
                texts[number] = tokenizer.decode(tokens[row, : counts[row]].tolist())
            progress(len(group))
    return texts
