"""A task for sweeps that trains in a second: one pretrained base, a head drawn with the seed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.sweeps.text_task import TextTask
from tests.experiments.tiny_models import filled
from tests.experiments.tiny_task import FEATURES, BagOfWords, TinyTask, tiny_task


@dataclasses.dataclass(frozen=True)
class OneBase(TinyTask):
    def model(self, seed):
        model = filled(lambda: BagOfWords(rngs=nnx.Rngs(0)), seed=0)
        # Under vmap this kind of key draws what it draws alone; unsafe_rbg does not.
        key = jax.random.key(seed, impl="threefry2x32")
        model.dropout.rngs.key.set_value(key)
        head = np.random.default_rng(seed).standard_normal((FEATURES, 2))
        model.classifier.kernel[...] = jnp.asarray(head, jnp.float32)
        return model


def tiny_sweep_task(train: int = 32) -> TextTask:
    return TextTask(OneBase(**vars(tiny_task(train=train))), name="tiny", base="bag of words")
