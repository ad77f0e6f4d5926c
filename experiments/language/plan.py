"""What a comparison would take, without training anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dora_jax as dora
from experiments.language.answers import AnswerBatches, Encoded, answer_loss
from experiments.language.experiment import Design
from experiments.language.runs import optimizer_of
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig
from experiments.trainer.methods import METHODS
from experiments.trainer.step import TrainStep


def plan_text(
    design: Design,
    shape: LlamaConfig,
    rows: Sequence[Encoded] | None,
    evaluated: Mapping[str, int],
    tokens: int,
) -> str:
    """Returns the number of runs and steps, and parameters, memory and time of each method.

    The step of the longest bucket is compiled, with shapes in place of weights. The time assumes
    that steps and evaluations run at the speed of a matrix product on this device.

    Args:
        design: The runs.
        shape: The decoder.
        rows: The encoded training rows; None plans with rows of the greatest length.
        evaluated: Validation rows and test rows.
        tokens: Tokens that each of them costs.
    """
    recipe, runs = design.recipe, design.runs_of_a_method
    lengths = {recipe.max_length: design.about["train_examples"]}
    if rows is not None:
        options: dict[str, Any] = {"max_length": recipe.max_length}
        options["train_on_prompt"] = recipe.train_on_prompt
        lengths = AnswerBatches(rows, recipe.batch_size, seed=0, **options).shapes
    mean = sum(length * count for length, count in lengths.items()) / sum(lengths.values())
    speed, seconds = _flops_a_second(), 0.0
    lines = [
        f"{design.about['model']}, {design.about['task']}: {sum(lengths.values()):,} training rows",
        f"each method: {runs} runs of {recipe.steps:,} steps of {recipe.batch_size} rows",
        "tokens to which rows are padded (and rows): "
        + ", ".join(f"{length} ({count:,})" for length, count in lengths.items()),
    ]
    for method in design.methods:
        trained, held, temporary = _costs(design, shape, method, max(lengths))
        step = 4 * _weights(shape) * recipe.batch_size * mean / speed
        seconds += runs * recipe.steps * step
        lines.append(
            f"{METHODS[method].title}: {trained:,} parameters trained; weights, adapters and "
            f"moments {held / 1e9:.2f} GB, and {temporary / 1e9:.2f} GB in the longest step; "
            f"about {step:.2g} s a step"
        )
    each, methods = 2 * _weights(shape) * tokens / speed, len(design.methods)
    seconds += each * evaluated["validation"] * (1 + methods * runs)
    seconds += each * evaluated["test"] * (1 + methods * design.seeds)
    lines.append(f"validation and test rows: {evaluated}, about {each:.2g} s each")
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines.append(f"about {seconds / 3600:.1f} h at {speed / 1e9:.0f} GFLOP/s ({devices})")
    return "\n".join(lines)


def _costs(design: Design, shape: LlamaConfig, method: str, length: int) -> tuple[int, int, int]:
    """Returns trained parameters, bytes held between steps, and temporary bytes of a step."""
    recipe = design.recipe
    dtype = jnp.dtype(design.trainer.dtype)
    switches = design.trainer.switches(Llama)

    def make() -> tuple[Llama, nnx.Optimizer]:
        base = Llama(shape, scan_layers=True, param_dtype=dtype, rngs=nnx.Rngs(0), **switches)
        model = recipe.adapt(base, method, 0)
        return model, optimizer_of(model, recipe, 1e-4)

    model, optimizer = nnx.eval_shape(make)
    step = TrainStep(model, optimizer, answer_loss, microbatches=design.trainer.microbatches)
    positions = length - 1 if recipe.train_on_prompt else min(length, 32)
    rows = recipe.batch_size

    def abstract(columns: int, kind: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), kind)

    batch = {
        "input_ids": abstract(length, np.int32),
        "attention_mask": abstract(length, np.int32),
        "positions": abstract(positions, np.int32),
        "targets": abstract(positions, np.int32),
        "weight": abstract(positions, np.float32),
    }
    memory: Any = step.lower(batch).compile().memory_analysis()
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(model, dora.DoRAParam)))
    return trained, memory.argument_size_in_bytes, memory.temp_size_in_bytes


def _weights(shape: LlamaConfig) -> int:
    """The parameters of all layers, each of which is one multiplication a token."""
    hidden, size = shape.hidden_size, shape.head_size
    attention = 2 * hidden * size * (shape.num_attention_heads + shape.key_value_heads)
    return shape.num_hidden_layers * (attention + 3 * hidden * shape.intermediate_size)


def _flops_a_second() -> float:
    """Measures a product of float32 matrices."""
    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    start = time.perf_counter()
    jax.block_until_ready([product(x) for _ in range(8)])
    return 8 * 2 * 1024**3 / (time.perf_counter() - start)
