"""Tokenises texts with `tokenizers`, and makes batches of token ids with `grain`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from jaxtyping import Int32

    Batch = dict[str, np.ndarray]


# Texts per batch where no gradient is needed.
EVAL_BATCH = 100

# Texts that are tokenised at a time: an encoding of 128 tokens takes 12 KB.
_BLOCK = 4096


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of texts, all of one length.

    Attributes:
        input_ids: Token ids, padded on the right with the tokenizer's padding token.
        attention_mask: 1 where there is a token of the text, 0 where there is padding.
        truncated: Number of texts that were longer and were cut off.
        token_type_ids: Of pairs of texts, the segment of each token as the tokenizer says: 0 and 1
            for BERT, 0 throughout for RoBERTa. None for single texts.
    """

    input_ids: Int32[np.ndarray, "text token"]
    attention_mask: Int32[np.ndarray, "text token"]
    truncated: int
    token_type_ids: Int32[np.ndarray, "text token"] | None = None


def tokenize(
    texts: Sequence[str],
    tokenizer_file: str | os.PathLike[str],
    max_length: int,
    *,
    pairs: Sequence[str] | None = None,
) -> TokenizedText:
    """Tokenises `texts` to exactly `max_length` tokens each, special tokens included.

    Args:
        texts: The texts.
        tokenizer_file: A `tokenizer.json` of the `tokenizers` package. Its settings for padding
            and truncation are not used. Its post-processor says what stands around and between
            the texts of a pair.
        max_length: Tokens per text. The end of a longer text is cut off, except for its final
            special token; of a pair, tokens are taken from the longer text until both fit.
        pairs: The second text of each pair.

    Raises:
        ValueError: The file is damaged, or there are no texts, or `max_length` leaves no room for a
            token of each text, or the tokenizer has no padding token.
        FileNotFoundError: There is no such tokenizer file.
    """
    if not os.path.isfile(tokenizer_file):
        raise FileNotFoundError(f"no tokenizer file at {os.fspath(tokenizer_file)}")
    if not texts:
        raise ValueError("no texts to tokenise")
    try:
        tokenizer = Tokenizer.from_file(os.fspath(tokenizer_file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises Exception; its panics are not even that
        raise ValueError(
            f"{os.fspath(tokenizer_file)} is damaged, or no tokenizer.json: "
            f"{str(error).strip()[:200]}. Fetch it again"
        ) from error
    special = tokenizer.num_special_tokens_to_add(is_pair=pairs is not None)
    least = special + (1 if pairs is None else 2)
    if max_length < least:
        raise ValueError(
            f"max_length={max_length} leaves no room for text: the tokenizer adds {special} "
            f"special tokens, so it must be at least {least}"
        )
    pad_id, pad_token = _padding(tokenizer)
    tokenizer.enable_truncation(max_length=max_length)
    tokenizer.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad_token)
    inputs: Any = texts if pairs is None else list(zip(texts, pairs, strict=True))
    names = ("ids", "attention_mask", *(() if pairs is None else ("type_ids",)))
    arrays = {name: np.empty((len(inputs), max_length), np.int32) for name in names}
    truncated = 0
    for start in range(0, len(inputs), _BLOCK):
        encodings = tokenizer.encode_batch(list(inputs[start : start + _BLOCK]))
        truncated += sum(bool(encoding.overflowing) for encoding in encodings)
        for name, array in arrays.items():
            array[start : start + _BLOCK] = [getattr(encoding, name) for encoding in encodings]
    return TokenizedText(arrays["ids"], arrays["attention_mask"], truncated, arrays.get("type_ids"))


def _padding(tokenizer: Tokenizer) -> tuple[int, str]:
    if tokenizer.padding:
        return tokenizer.padding["pad_id"], tokenizer.padding["pad_token"]
    for token in ("[PAD]", "<pad>"):
        pad_id = tokenizer.token_to_id(token)
        if pad_id is not None:
            return pad_id, token
    raise ValueError(
        "the tokenizer has no padding token: neither padding settings nor [PAD] or <pad> in its "
        "vocabulary. Set one with enable_padding(pad_id=..., pad_token=...) and save the tokenizer."
    )


def train_batches(
    tokens: TokenizedText,
    labels: Int32[np.ndarray, " text"],
    batch_size: int,
    *,
    seed: int,
    num_epochs: int | None = None,
    rows: slice = slice(None),
) -> grain.DatasetIterator[Batch]:
    """Returns shuffled batches for training, of one fixed shape, in a new order every epoch.

    The order depends only on `seed` and the number of texts. An epoch has
    `len(labels) // batch_size` batches. The texts that do not fill a batch are left out; every
    epoch leaves out others. `get_state()` returns the position of the iterator as a small
    dictionary for JSON. `set_state(state)` restores it on an iterator made with the same arguments,
    and the following batches are those of an uninterrupted run.

    Args:
        tokens: The texts.
        labels: One label per text.
        batch_size: Texts per batch.
        seed: Seed of the shuffling, 0 <= seed < 2**32.
        num_epochs: Number of passes over the texts. None repeats them without end.
        rows: Of each batch, those that are read. Each of several processes reads its own.

    Returns:
        An iterator of `{"input_ids": int32 (batch, token), "attention_mask": int32 (batch, token),
        "label": int32 (batch,), "weight": float32 (batch,)}`, with weight 1 throughout.

    Raises:
        ValueError: The labels do not match the texts, or there are fewer texts than `batch_size`.

    Example:
        >>> tokens = TokenizedText(
        ...     np.arange(10, dtype=np.int32)[:, None], np.ones((10, 1), np.int32), 0
        ... )
        >>> batches = train_batches(tokens, np.zeros(10, np.int32), 4, seed=0)
        >>> next(batches)["input_ids"].shape
        (4, 1)
        >>> batches.get_state()
        {'next_index': 1}
    """
    _check(tokens, labels, batch_size)
    if len(labels) < batch_size:
        raise ValueError(
            f"{len(labels)} texts do not fill a batch of {batch_size}: choose a smaller batch_size"
        )
    dataset = grain.MapDataset.range(len(labels)).seed(seed).shuffle()
    # Batches are made before repeating, so that no batch mixes two epochs.
    dataset = dataset.batch(batch_size, drop_remainder=True).repeat(num_epochs)
    if rows != slice(None):
        dataset = dataset.map(lambda index: index[rows])
    return _iterator(dataset, tokens, labels)


def eval_batches(
    tokens: TokenizedText, labels: Int32[np.ndarray, " text"], batch_size: int
) -> grain.DatasetIterator[Batch]:
    """Returns batches for evaluation, of one fixed shape, with every text once and in order.

    The last batch is filled up with copies of the first text that have weight 0, so the mean over
    all texts is `sum(weight * value) / sum(weight)`. The arrays are those of `train_batches`.

    Raises:
        ValueError: The labels do not match the texts, or `batch_size` is below 1.

    Example:
        >>> tokens = TokenizedText(
        ...     np.arange(3, dtype=np.int32)[:, None], np.ones((3, 1), np.int32), 0
        ... )
        >>> [batch["weight"].tolist() for batch in eval_batches(tokens, np.zeros(3, np.int32), 2)]
        [[1.0, 1.0], [1.0, 0.0]]
    """
    _check(tokens, labels, batch_size)
    padded_length = -(-len(labels) // batch_size) * batch_size
    return _iterator(grain.MapDataset.range(padded_length).batch(batch_size), tokens, labels)


def _check(tokens: TokenizedText, labels: np.ndarray, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if labels.shape != tokens.input_ids.shape[:1] or not len(labels):
        raise ValueError(
            f"need one label per text and at least one text, got labels of shape {labels.shape} "
            f"for input_ids of shape {tokens.input_ids.shape}"
        )


def _iterator(
    indices: grain.MapDataset[np.ndarray], tokens: TokenizedText, labels: np.ndarray
) -> grain.DatasetIterator[Batch]:
    """Looks up batches of indices. An index past the last text is padding."""

    def look_up(index: np.ndarray) -> Batch:
        is_text = index < len(labels)
        row = np.where(is_text, index, 0)
        return {
            "input_ids": tokens.input_ids[row],
            "attention_mask": tokens.attention_mask[row],
            "label": labels[row].astype(np.int32),
            "weight": is_text.astype(np.float32),
        }

    # No reading threads are needed: the arrays are in memory and a batch is one look-up.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(indices.map(look_up).to_iter_dataset(options))
