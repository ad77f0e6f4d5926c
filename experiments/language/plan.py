"""What a run of the commonsense experiment would take, without training anything."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

import dora_jax as dora
from experiments.language.answers import AnswerBatches, answer_loss
from experiments.language.material import CommonsenseRows, load_material
from experiments.language.runs import optimizer_of
from experiments.models.llama import Llama
from experiments.models.llama_config import LlamaConfig
from experiments.models.smollm import smollm2_folder
from experiments.planning.models import MODELS
from experiments.trainer.methods import METHODS
from experiments.trainer.step import TrainStep

if TYPE_CHECKING:
    from experiments.commonsense import Config

_NAMES = {"llama2-7b": "llama-7b"}  # of the same sizes


def plan_text(config: Config) -> str:
    """Returns the number of runs and steps, and parameters, memory and time of each method.

    The step of the longest bucket is compiled, with shapes in place of weights. The time assumes
    that steps and evaluations run at the speed of a matrix product on this device.
    """
    preset = config.settled
    shape = _shape(config)
    material = _material(config)
    design = config.design(material)
    recipe, runs = design.recipe, design.runs_of_a_method
    rows = design.about["train_examples"]
    buckets = {preset.max_length: rows}
    if material is not None:
        options: dict[str, Any] = {"train_on_prompt": preset.train_on_prompt}
        batches = AnswerBatches(
            material.train, recipe.batch_size, seed=0, max_length=recipe.max_length, **options
        )
        buckets = batches.shapes
    mean = sum(length * count for length, count in buckets.items()) / sum(buckets.values())
    speed = _flops_a_second()
    lines = [
        f"{preset.model}, {config.task}, form {preset.form}: {rows:,} training rows",
        f"each method: {runs} runs of {recipe.steps:,} steps of {recipe.batch_size} rows",
        "tokens to which rows are padded (and rows): "
        + ", ".join(f"{length} ({count:,})" for length, count in buckets.items()),
    ]
    seconds = 0.0
    for method in config.methods:
        trained, held, temporary = _costs(config, shape, method, max(buckets))
        step = 4 * _weights(shape) * recipe.batch_size * mean / speed
        seconds += runs * recipe.steps * step
        lines.append(
            f"{METHODS[method].title}: {trained:,} parameters trained; weights, adapters and "
            f"moments {held / 1e9:.2f} GB, and {temporary / 1e9:.2f} GB in the longest step; "
            f"about {step:.2g} s a step"
        )
    if material is not None:
        splits = material.splits
        tested, chosen = (sum(map(len, splits[s].values())) for s in ("test", "validation"))
        # About 60 tokens a question, with its options.
        each = 2 * _weights(shape) * 60 / speed
        methods = len(config.methods)
        seconds += each * (chosen + tested + methods * (runs * chosen + preset.seeds * tested))
        lines.append(f"{chosen:,} validation rows, {tested:,} test rows: about {each:.2g} s each")
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines.append(f"about {seconds / 3600:.1f} h at {speed / 1e9:.0f} GFLOP/s ({devices})")
    return "\n".join(lines)


def _shape(config: Config) -> LlamaConfig:
    if config.checkpoint is not None:
        return LlamaConfig.from_json(config.checkpoint / "config.json")
    name = "smollm2-135m" if config.preset == "small" else config.preset
    return MODELS[_NAMES.get(name, name)]


def _material(config: Config) -> CommonsenseRows | None:
    """The rows, if there is a tokenizer to count their tokens."""
    if config.checkpoint is None and config.preset != "small":
        return None
    folder = smollm2_folder() if config.checkpoint is None else config.checkpoint
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return load_material(config.data, config.settled, tokenizer)


def _costs(config: Config, shape: LlamaConfig, method: str, length: int) -> tuple[int, int, int]:
    """Returns trained parameters, bytes held between steps, and temporary bytes of a step."""
    recipe = config.recipe(1)
    dtype = jnp.dtype(config.trainer.dtype)
    switches = config.trainer.switches(Llama)

    def make() -> tuple[Llama, nnx.Optimizer]:
        base = Llama(shape, scan_layers=True, param_dtype=dtype, rngs=nnx.Rngs(0), **switches)
        model = recipe.adapt(base, method, 0)
        return model, optimizer_of(model, recipe, 1e-4)

    model, optimizer = nnx.eval_shape(make)
    step = TrainStep(model, optimizer, answer_loss, microbatches=config.trainer.microbatches)
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
