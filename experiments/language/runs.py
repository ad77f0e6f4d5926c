"""Fine-tunes a decoder on prompts with answers: one method, one learning rate, one seed a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx

import dora_jax as dora
from experiments.language.answers import AnswerBatches, Encoded, answer_loss
from experiments.trainer.loop import Training, fit
from experiments.trainer.methods import METHODS
from experiments.trainer.placement import own_rows
from experiments.trainer.run_folder import finish_run, finished_run, start_run
from experiments.trainer.settings import TrainerSettings

if TYPE_CHECKING:
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
        steps: Number of steps.
        warmup: Steps in which the learning rate rises; then it falls to 0 along a line.
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
    steps: int
    warmup: int
    batch_size: int
    max_length: int
    train_on_prompt: bool = False
    checkpoint_every: int = 50

    def adapters(self, method: str) -> dora.DoRAConfig:
        """Returns the configuration of the adapters of a method.

        Raises:
            SystemExit: The method trains all parameters.
        """
        switches = METHODS[method].switches
        if switches is None:
            raise SystemExit(f"{method} has no adapters: choose another of {list(METHODS)}")
        given = {"rank": self.rank, "alpha": self.alpha, **switches}
        return dora.DoRAConfig(
            dropout=self.dropout, target_modules=list(self.target_modules), **given
        )

    def adapt(self, base: Llama, method: str, seed: int) -> Llama:
        """Returns a base with new adapters."""
        tokens = np.zeros((1, 4), np.int32)
        rngs = nnx.Rngs(1000 + seed)
        return dora.apply_dora(base, self.adapters(method), rngs=rngs, inputs=(tokens, tokens))


@functools.cache
def _optimizer(method: str, rate: float, recipe: Recipe) -> optax.GradientTransformation:
    """Returns one optimiser for all seeds: JAX would compile the step again for a new one."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, max(1, recipe.warmup)),
            optax.linear_schedule(rate, 0.0, max(1, recipe.steps - recipe.warmup)),
        ],
        [max(1, recipe.warmup)],
    )
    return METHODS[method].optimizer(schedule, recipe.magnitude_lr_ratio)


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
        return {**self.about, **own, **recipe, **self.trainer.changes_results}

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
        forgetting: Evaluate | None = None,
    ) -> dict[str, Any]:
        """Trains, from the newest checkpoint on if there is one, and returns the summary.

        Args:
            base: The pretrained decoder. It stays as it is.
            rows: To train on.
            validate: The figures of the merged decoder on the validation rows.
            forgetting: Its `loss` on texts that it was not tuned on. The summary holds the change.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start_run(self.folder, self.config)
        recipe = self.recipe
        model = recipe.adapt(base, self.method, self.seed)
        transformation = _optimizer(self.method, self.learning_rate, recipe)
        mesh = self.trainer.device_mesh()
        batches = AnswerBatches(
            rows,
            recipe.batch_size,
            seed=self.seed,
            max_length=recipe.max_length,
            train_on_prompt=recipe.train_on_prompt,
            part=own_rows(mesh, recipe.batch_size),
        )
        config = recipe.adapters(self.method)
        training = Training(
            model=model,
            optimizer=nnx.Optimizer(model, transformation, wrt=dora.DoRAParam),
            loss=answer_loss,
            batches=batches,
            steps=recipe.steps,
            config=config,
            checkpoint_every=recipe.checkpoint_every,
            title=self.title,
        )
        fitted = fit(training, self.folder, self.trainer)
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            merged = dora.merge(model)
            summary = {
                "validation": dict(validate(merged)),
                "metric": "accuracy",
                "trainable_parameters": dora.adapters.count_parameters(dora.get_adapters(model))[
                    "total"
                ],
                "seconds_per_step": fitted.seconds_per_step,
                "members": 1,
                "temporary_bytes": None,
                "forgetting": None if forgetting is None else forgetting(merged)["loss"],
            }
        dora.save(self.folder / "adapter", model, config, overwrite=True)
        finish_run(self.folder, summary)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return summary

    def trained(self, base: Llama) -> Llama:
        """Returns the decoder of the finished run, merged."""
        return dora.merge(dora.load(self.folder / "adapter", base))
