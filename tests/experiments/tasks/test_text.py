from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.tasks.text import TokenizedText, eval_batches, tokenize, train_batches

VOCABULARY = ["[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "[PAD]"]
CLS, SEP, PAD = 1, 2, 6


def make_tokenizer(vocabulary: list[str]) -> Tokenizer:
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return tokenizer


@pytest.fixture(params=["no settings", "padding and truncation of its own"])
def tokenizer_file(request, tmp_path):
    tokenizer = make_tokenizer(VOCABULARY)
    if request.param != "no settings":
        tokenizer.enable_padding(length=128, pad_id=PAD, pad_token="[PAD]", direction="left")
        tokenizer.enable_truncation(max_length=4, stride=1)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_ids_and_mask_have_the_asked_length_whatever_the_file_says(tokenizer_file):
    tokens = tokenize(["a b", "c", "a b c a b"], tokenizer_file, max_length=6)
    expected = [[CLS, 3, 4, SEP, PAD, PAD], [CLS, 5, SEP, PAD, PAD, PAD], [CLS, 3, 4, 5, 3, SEP]]
    assert tokens.input_ids.tolist() == expected
    assert tokens.attention_mask.tolist() == [[int(i != PAD) for i in row] for row in expected]
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int32


@pytest.mark.parametrize(("max_length", "truncated"), [(3, 3), (4, 2), (5, 1), (6, 0)])
def test_truncated_counts_the_texts_that_are_longer(tokenizer_file, max_length, truncated):
    texts = ["a", "a b", "a b c", "a b c a"]
    assert tokenize(texts, tokenizer_file, max_length).truncated == truncated


def test_many_texts_are_tokenised_as_each_alone(tokenizer_file):
    texts = [" ".join("abc"[i % 7 % 3 :][: 1 + i % 3]) for i in range(9000)]
    tokens = tokenize(texts, tokenizer_file, max_length=4)
    for i in (0, 4095, 4096, 8191, 8192, 8999):
        alone = tokenize([texts[i]], tokenizer_file, max_length=4)
        np.testing.assert_array_equal(tokens.input_ids[i : i + 1], alone.input_ids)
    assert tokens.truncated == sum(len(text.split()) > 2 for text in texts)


def test_pairs_are_joined_as_the_tokenizer_says(tokenizer_file):
    tokens = tokenize(["a b", "c"], tokenizer_file, 8, pairs=["c", "a b c a b c"])
    expected = [[CLS, 3, 4, SEP, 5, SEP, PAD, PAD], [CLS, 5, SEP, 3, 4, 5, 3, SEP]]
    assert tokens.input_ids.tolist() == expected
    assert tokens.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert tokens.token_type_ids.dtype == np.int32
    assert tokens.truncated == 1  # of the longer text, and not of the end of the pair
    assert tokenize(["a"], tokenizer_file, 8).token_type_ids is None
    with pytest.raises(ValueError, match="at least 5"):
        tokenize(["a"], tokenizer_file, 4, pairs=["b"])


def test_pairs_of_roberta_have_one_token_type_and_two_separators(tmp_path):
    tokenizer = make_tokenizer(VOCABULARY)
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = tokenize(["a"], tmp_path / "tokenizer.json", 6, pairs=["b"])
    assert tokens.input_ids.tolist() == [[CLS, 3, SEP, SEP, 4, SEP]]
    assert tokens.token_type_ids.tolist() == [[0] * 6]


def test_bad_input_is_named(tokenizer_file, tmp_path):
    with pytest.raises(ValueError, match="at least 3"):
        tokenize(["a"], tokenizer_file, max_length=2)
    with pytest.raises(ValueError, match="no texts"):
        tokenize([], tokenizer_file, max_length=8)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        tokenize(["a"], tmp_path / "absent.json", max_length=8)
    for text in ("", "{", "[]", "{}", '{"model": {"type": "WordPiece"}}', "\x00"):
        (tmp_path / "damaged.json").write_text(text)
        with pytest.raises(ValueError, match=r"damaged\.json is damaged"):
            tokenize(["a"], tmp_path / "damaged.json", max_length=8)
    make_tokenizer(VOCABULARY[:-1]).save(str(tmp_path / "no_pad.json"))
    with pytest.raises(ValueError, match="no padding token"):
        tokenize(["a"], tmp_path / "no_pad.json", max_length=8)


def numbered(n: int) -> tuple[TokenizedText, np.ndarray]:
    """Texts whose first token is their number, and whose label is their number too."""
    ids = np.stack([np.arange(n), np.arange(n) % 2], axis=1).astype(np.int32)
    return TokenizedText(ids, ids.copy(), truncated=0), np.arange(n, dtype=np.int32)


def order(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch["label"]]


@pytest.mark.parametrize("n", [12, 13, 15])
def test_an_epoch_has_no_text_twice_and_the_next_one_another_order(n):
    batches = list(train_batches(*numbered(n), 4, seed=0, num_epochs=3))
    assert len(batches) == 3 * 3
    epochs = [order(batches[start : start + 3]) for start in (0, 3, 6)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rows_of_a_batch_belong_together():
    for batch in islice(train_batches(*numbered(13), 4, seed=0), 10):
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 2)
        np.testing.assert_array_equal(batch["input_ids"][:, 0], batch["label"])
        np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"])
        np.testing.assert_array_equal(batch["weight"], np.ones(4, np.float32))


def test_order_is_a_function_of_the_seed():
    first, again, other = (
        order(train_batches(*numbered(50), 5, seed=seed, num_epochs=2)) for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
    # Nor is one seed's second epoch the next seed's first.
    assert first[50:] != other[:50]


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7])
def test_resumed_stream_equals_the_uninterrupted_one(steps):
    uninterrupted = train_batches(*numbered(13), 4, seed=3, num_epochs=4)
    list(islice(uninterrupted, steps))
    state = json.loads(json.dumps(uninterrupted.get_state()))
    resumed = train_batches(*numbered(13), 4, seed=3, num_epochs=4)
    resumed.set_state(state)
    rest, rest_resumed = list(uninterrupted), list(resumed)
    assert len(rest) == 12 - steps
    for expected, batch in zip(rest, rest_resumed, strict=True):
        assert expected.keys() == batch.keys()
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name], strict=True)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 20])
def test_evaluation_counts_every_text_once_in_batches_of_one_shape(batch_size):
    tokens, labels = numbered(13)
    batches = list(eval_batches(tokens, labels, batch_size))
    assert {batch["input_ids"].shape for batch in batches} == {(batch_size, 2)}
    counted = [
        int(label)
        for batch in batches
        for label, weight in zip(batch["label"], batch["weight"], strict=True)
        if weight == 1
    ]
    assert counted == list(range(13))
    assert sum(batch["weight"].sum() for batch in batches) == 13


def test_batches_that_cannot_be_made_are_refused():
    tokens, labels = numbered(3)
    with pytest.raises(ValueError, match="do not fill a batch of 4"):
        train_batches(tokens, labels, 4, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        eval_batches(tokens, labels, 0)
    with pytest.raises(ValueError, match="one label per text"):
        eval_batches(tokens, labels[:2], 2)
