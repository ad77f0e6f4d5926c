"""Fine-tunes a decoder on prompts with answers: one method, one learning rate, one seed a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dora_jax as dora
from experiments.language.answers import AnswerBatches, Encoded, answer_loss
from experiments.trainer.finite import DivergedError
from experiments.trainer.loop import Training, fit
from experiments.trainer.methods import METHODS
from experiments.trainer.placement import own_rows
from experiments.trainer.run_folder import finish_run, finished_run, start_run
from experiments.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from jaxtyping import Array

    from experiments.models.llama import Llama

Evaluate = Callable[[Any], Mapping[str, float]]
"""Returns figures of a merged decoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How decoders are fine-tuned, apart from the method, the learning rate and the seed.

    Attributes:
        rank: Rank of the adapters.
        alpha: The scaling of the adapters is `alpha / rank`.
        dropout: On the input of the low-rank branch.
        target_modules: The names of the adapted layers.
        magnitude_lr_ratio: Learning rate of the magnitude over that of the factors.
        weight_decay: Decoupled decay of all trained arrays.
        steps: Number of steps.
        warmup: Steps in which the learning rate rises; at least 1.
        decay: How it falls to 0 afterwards.
        batch_size: Rows of a step.
        max_length: Tokens of a row; the end of a longer one is cut off.
        train_on_prompt: Whether the loss counts the prompt's tokens too.
        checkpoint_every: Steps between two checkpoints.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    magnitude_lr_ratio: float = 1.0
    weight_decay: float = 0.0
    steps: int
    warmup: int
    decay: Literal["linear", "cosine"] = "linear"
    batch_size: int
    max_length: int
    train_on_prompt: bool = False
    checkpoint_every: int = 50

    def adapters(self, method: str) -> dora.DoRAConfig:
        """Returns the configuration of the adapters of a method.

        Raises:
            SystemExit: The method trains all parameters.
        """
        if METHODS[method].switches is None:
            raise SystemExit(f"{method} has no adapters: choose another of {list(METHODS)}")
        fields = {"dropout": self.dropout, "target_modules": list(self.target_modules)}
        return METHODS[method].config(self.rank, self.alpha, fields)

    def adapt(self, base: Llama, method: str, seed: int) -> Llama:
        """Returns a base with new adapters."""
        tokens = np.zeros((1, 4), np.int32)
        rngs = nnx.Rngs(1000 + seed)
        return dora.apply_dora(base, self.adapters(method), rngs=rngs, inputs=(tokens, tokens))


class _AtPeak(NamedTuple):
    """The state of an optimiser whose updates are for a peak of 1, and the peak itself."""

    peak: Array
    inner: Any


@functools.cache
def _transformation(recipe: Recipe) -> optax.GradientTransformation:
    """Returns one transformation for all runs: JAX compiles a step for each new one.

    So the learning rate's peak is in its state. All updates are proportional to it.
    """
    warmup, rest = recipe.warmup, max(1, recipe.steps - recipe.warmup)
    falling = (
        optax.linear_schedule(1.0, 0.0, rest)
        if recipe.decay == "linear"
        else optax.cosine_decay_schedule(1.0, rest)
    )
    inner = dora.dora_optimizer(
        optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), falling], [warmup]),
        magnitude_lr_ratio=recipe.magnitude_lr_ratio,
        weight_decay=recipe.weight_decay,
        magnitude_weight_decay=recipe.weight_decay,
    )

    def update(updates: Any, state: _AtPeak, params: Any = None) -> tuple[Any, _AtPeak]:
        updates, after = inner.update(updates, state.inner, params)
        updates = jax.tree.map(lambda x: (state.peak * x).astype(x.dtype), updates)
        return updates, _AtPeak(state.peak, after)

    return optax.GradientTransformation(
        lambda params: _AtPeak(jnp.ones((), jnp.float32), inner.init(params)), update
    )


def optimizer_of(model: Llama, recipe: Recipe, learning_rate: float) -> nnx.Optimizer:
    """Returns the optimiser of a model's adapters: AdamW with gradients clipped to norm 1."""
    optimizer = nnx.Optimizer(model, _transformation(recipe), wrt=dora.DoRAParam)
    optimizer.opt_state.peak[...] = jnp.float32(learning_rate)
    return optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """One run, and the folder that holds its results.

    Attributes:
        folder: As `run_folder` describes it. A finished run has its adapters in `adapter/`.
        method: A name in `METHODS`.
        learning_rate: The peak.
        seed: Seed of the adapters and of the order of the rows.
        recipe: What runs have in common.
        about: Further settings that the result depends on, for `config.json`.
        trainer: Devices and precision.
    """

    folder: Path
    method: str
    learning_rate: float
    seed: int
    recipe: Recipe
    about: Mapping[str, Any]
    trainer: TrainerSettings

    @property
    def config(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON."""
        recipe = dataclasses.asdict(self.recipe)
        del recipe["checkpoint_every"]
        own = {"method": self.method, "learning_rate": self.learning_rate, "seed": self.seed}
        settings = {**self.about, **own, **recipe, **self.trainer.changes_results}
        return {**settings, "rank": self.recipe.adapters(self.method).rank}

    @property
    def title(self) -> str:
        """The name in the progress line."""
        return f"{self.method} r{self.recipe.rank}, {self.learning_rate:g}, seed {self.seed}"

    def summary(self) -> dict[str, Any] | None:
        """Returns the summary of the finished run, or None if it has not finished.

        Raises:
            SystemExit: The folder holds a run of other settings.
        """
        return finished_run(self.folder, self.config)

    def train(
        self,
        base: Llama,
        rows: Sequence[Encoded],
        *,
        validate: Evaluate,
        forgetting: Callable[[Any], float | None] = lambda _: None,
    ) -> dict[str, Any]:
        """Trains, from the newest checkpoint on if there is one, and returns the summary.

        If the training diverges, the summary says so and has no figures.

        Args:
            base: The pretrained decoder. It stays as it is.
            rows: To train on.
            validate: The figures of the merged decoder on the validation rows.
            forgetting: By how much its loss grew on texts that it was not tuned on, if known.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start_run(self.folder, self.config)
        model = self.recipe.adapt(base, self.method, self.seed)
        config = self.recipe.adapters(self.method)
        trained = dora.adapters.count_parameters(dora.get_adapters(model))
        summary: dict[str, Any] = {
            "validation": {"accuracy": None, "loss": None},
            "metric": "accuracy",
            "trainable_parameters": trained["total"],
            "seconds_per_step": None,
            "members": 1,
            "temporary_bytes": None,
            "forgetting": None,
        }
        try:
            fitted = fit(self._training(model, rows), self.folder, self.trainer)
        except DivergedError as error:
            summary["diverged"] = str(error)
        else:
            summary["seconds_per_step"] = fitted.seconds_per_step
            mesh = self.trainer.device_mesh()
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                merged = dora.merge(model)
                summary["validation"] = dict(validate(merged))
                summary["forgetting"] = forgetting(merged)
            dora.save(self.folder / "adapter", model, config, overwrite=True)
        finish_run(self.folder, summary)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return summary

    def _training(self, model: Llama, rows: Sequence[Encoded]) -> Training:
        recipe = self.recipe
        batches = AnswerBatches(
            rows,
            recipe.batch_size,
            seed=self.seed,
            max_length=recipe.max_length,
            train_on_prompt=recipe.train_on_prompt,
            part=own_rows(self.trainer.device_mesh(), recipe.batch_size),
        )
        return Training(
            model=model,
            optimizer=optimizer_of(model, recipe, self.learning_rate),
            loss=answer_loss,
            batches=batches,
            steps=recipe.steps,
            config=recipe.adapters(self.method),
            checkpoint_every=recipe.checkpoint_every,
            title=self.title,
        )

    def trained(self, base: Llama) -> Llama:
        """Returns the decoder of the finished run, merged."""
        return dora.merge(dora.load(self.folder / "adapter", base))
