"""The log-likelihood of the options of questions under a decoder.

The options of a question share its prompt, which is computed once: its keys and values are kept,
and every option goes on from them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.language.answers import bucket, token_losses
from experiments.models.generation import left_padded
from experiments.models.kv_cache import empty_cache

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int
    from tokenizers import Tokenizer

    from experiments.models.llama import Llama
    from experiments.tasks.commonsense import Question

# Options of a batch: at most so many, and fewer where they are long.
_ROWS, _TOKENS = 32, 1024

_PROMPTS = (32, 64, 128, 256, 512, 1024, 2048)
_OPTIONS = (8, 32, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Options:
    """A question as token ids.

    Attributes:
        prompt: Those before the answer.
        options: Those of each answer.
        label: Index of the right answer.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    label: int

    @property
    def shape(self) -> _Shape:
        """The arrays of the batch that it is in."""
        count = len(self.options)
        longest = bucket(max(map(len, self.options)), _OPTIONS)
        # One question has to fit. There are few kinds of batches, because each is compiled.
        rows = max(min(_ROWS, _TOKENS // longest), bucket(count, (2, 4, 8, 16, 32, 64)))
        prompts = rows // bucket(count, (1, 2, 4, 8, 16, 32, 64)) if count <= 4 else rows // 4
        return _Shape(bucket(len(self.prompt), _PROMPTS), longest, max(1, prompts), rows)


class _Shape(NamedTuple):
    """The sizes of a batch: tokens of a prompt and of an option, prompts, and options."""

    length: int
    longest: int
    prompts: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """The log-likelihoods of the options of questions.

    Attributes:
        sums: Sum over the tokens of each option, in nats; minus infinity beyond a question's last.
        lengths: Tokens of each option.
        labels: Index of the right option.
    """

    sums: Float[np.ndarray, "question option"]
    lengths: Int[np.ndarray, "question option"]
    labels: Int[np.ndarray, " question"]

    @property
    def means(self) -> Float[np.ndarray, "question option"]:
        """Nats a token: the length-normalised likelihood."""
        return self.sums / np.maximum(self.lengths, 1)

    def metrics(self) -> dict[str, float]:
        """Returns the accuracies, and the loss: nats a token of the right options.

        `accuracy` chooses the option with the largest likelihood a token, `accuracy_sum` that with
        the largest likelihood.
        """
        right = np.arange(len(self.labels)), self.labels
        return {
            "accuracy": float((self.means.argmax(1) == self.labels).mean()),
            "accuracy_sum": float((self.sums.argmax(1) == self.labels).mean()),
            "loss": float(-self.sums[right].sum() / self.lengths[right].sum()),
        }


def encode_questions(tokenizer: Tokenizer, questions: Sequence[Question]) -> list[Options]:
    """Encodes prompts and options apart, as training does."""
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    texts = [option for question in questions for option in question.options]
    options = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    return [
        Options(
            tuple(prompt.ids),
            tuple(tuple(next(options).ids) for _ in question.options),
            question.label,
        )
        for prompt, question in zip(prompts, questions, strict=True)
    ]


def score(
    model: Llama, questions: Sequence[Options], progress: Callable[[int], None] = lambda _: None
) -> Scores:
    """Returns the log-likelihoods of all options.

    Args:
        model: A decoder. A merged one is fastest, and has the programs of its base.
        questions: The questions, in any order: those of similar lengths share a batch.
        progress: Called with the number of questions that are done since the last call.
    """
    width = max(len(question.options) for question in questions)
    sums = np.full((len(questions), width), -np.inf)
    lengths = np.zeros((len(questions), width), int)
    # Not `nnx.jit`, which returns all parameters from every call: copies of 0.5 GB for SmolLM2.
    split = nnx.split(nnx.view(model, deterministic=True, raise_if_not_found=False))
    for batch, places in _batches(questions):
        found = np.asarray(_option_sums(*split, *batch))
        for row, (question, option) in enumerate(places):
            sums[question, option] = found[row]
            lengths[question, option] = len(questions[question].options[option])
        progress(len({question for question, _ in places}))
    return Scores(sums, lengths, np.array([question.label for question in questions]))


def _batches(
    questions: Sequence[Options],
) -> Iterator[tuple[tuple[Any, ...], list[tuple[int, int]]]]:
    """Yields arrays for `_option_sums`, and the question and option of each row."""
    shapes: dict[_Shape, list[int]] = {}
    for number in range(len(questions)):
        shapes.setdefault(questions[number].shape, []).append(number)
    for shape, numbers in sorted(shapes.items()):
        group: list[int] = []
        rows = 0
        for number in numbers:
            count = len(questions[number].options)
            if group and (len(group) == shape.prompts or rows + count > shape.rows):
                yield _arrays(questions, group, shape)
                group, rows = [], 0
            group.append(number)
            rows += count
        yield _arrays(questions, group, shape)


def _arrays(
    questions: Sequence[Options], group: list[int], shape: _Shape
) -> tuple[tuple[Any, ...], list[tuple[int, int]]]:
    filled = group + [group[0]] * (shape.prompts - len(group))
    ids, mask = left_padded([questions[number].prompt for number in filled], shape.length)
    places = [(n, option) for n in group for option in range(len(questions[n].options))]
    of_prompt = np.zeros(shape.rows, np.int32)
    options = np.zeros((shape.rows, shape.longest), np.int32)
    real = np.zeros((shape.rows, shape.longest), np.int32)
    for row, (number, option) in enumerate(places):
        tokens = questions[number].options[option]
        of_prompt[row] = group.index(number)
        options[row, : len(tokens)] = tokens
        real[row, : len(tokens)] = 1
    return ((ids, mask), of_prompt, (options, real)), places


@functools.partial(jax.jit, static_argnums=0)
def _option_sums(
    graphdef: Any,
    state: Any,
    prompts: tuple[Int[Array, "prompt token"], Int[Array, "prompt token"]],
    of_prompt: Int[Array, " row"],
    options: tuple[Int[Array, "row token"], Int[Array, "row token"]],
) -> Float[Array, " row"]:
    """Returns the log-likelihood of each option after its prompt; ids come with their masks."""
    model = nnx.merge(graphdef, state, copy=True)
    (asked, mask), (answered, real) = prompts, options
    slots = asked.shape[1] + answered.shape[1]
    dtype = jax.eval_shape(lambda: model.embed_tokens(asked)).dtype
    cache = empty_cache(model.config, len(asked), slots, dtype)
    hidden, cache = model.extend(asked, cache, mask)
    # What predicts the first token of an option is the last state of its prompt.
    first = jnp.take(hidden[:, -1:], of_prompt, axis=0)
    rest, _ = model.extend(answered[:, :-1], cache.take(of_prompt), real[:, :-1])
    losses = token_losses(model, jnp.concatenate([first, rest], axis=1), answered)
    return -jnp.sum(losses * real, axis=1)
