"""What a task gives to a sweep: a model, batches, a loss, and how predictions are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Batch = Mapping[str, np.ndarray]
Split = Literal["validation", "test"]


class Scores(NamedTuple):
    """How the predictions of one model on a split are scored.

    Attributes:
        metrics: By name, higher is better, except for `loss`, the mean loss.
        predictions: For each example what is compared with its label, `(example, ...)`.
        labels: `(example,)`.
    """

    metrics: dict[str, float]
    predictions: np.ndarray
    labels: np.ndarray


class SweepTask(Protocol):
    """A task and the pretrained model that is adapted to it.

    Many members are trained in one program. So the pretrained arrays that are not trained have to
    be the same for every seed, and all batches have to be of few shapes: each new one is compiled.

    Attributes:
        name: Of the folder that holds the runs.
        base: Name of the pretrained model.
        metric: Of `Scores.metrics`, the one that chooses. Higher is better.
        max_length: Most tokens of a text.
        train_examples: Number of training examples.
        fields: Fields of `DoRAConfig`: which layers are adapted, which are trained in full.
    """

    # Read-only, so that a frozen dataclass fits.
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def base(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def train_examples(self) -> int: ...  # noqa: D102
    @property
    def fields(self) -> Mapping[str, Any]: ...  # noqa: D102

    def model(self, seed: int) -> nnx.Module:
        """Returns the pretrained model, with new parts, such as a head, drawn with the seed.

        Keys of dropout are of JAX's default kind, `threefry2x32`: with another kind a member draws
        other numbers than it would alone.
        """
        ...

    def example_call(self) -> tuple[Any, ...]:
        """Returns the arguments of a call of the model, to check what reads its kernels."""
        ...

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Returns batches for training, without end, always the same ones for a seed.

        The arrays have a leading axis of examples. Where the batches of two members differ in other
        axes at a step, the shorter are padded at the end with zeros: zeros must mean padding.
        """
        ...

    def loss(
        self, model: nnx.Module, batch: Any
    ) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
        """Returns the mean loss and metrics of a batch, as `trainer.step.Loss` does."""
        ...

    def predict(self, model: nnx.Module, batch: Any) -> Float[Array, "row ..."]:
        """Returns the outputs that `score` needs, for a model in eval mode; it is compiled."""
        ...

    def eval_batches(self, split: Split) -> Sequence[Batch]:
        """Returns the batches of a split, for `predict`."""
        ...

    def score(self, split: Split, outputs: np.ndarray) -> Scores:
        """Scores the outputs of `predict`, those of all batches one after the other."""
        ...
