"""What many members in one program cost, against each of them alone: time, memory and bytes.

On the device that JAX finds, steps of a BERT of MiniLM's shape are timed in turn: one program with
all members, and one member after the other. With a target, one block of LLaMA-7B is compiled for
one chip of a TPU that need not be there, and the bytes that it reads and writes are counted.

Seen with jax 0.10: on two busy CPU cores, 8 members of 96 tokens took 0.61 of the time of separate
steps (quartiles 0.59 to 0.67, 15 rounds), and 0.97 of 8 times the temporary memory of one; losses
of 17 steps differed by 2.4e-7 at most. 3 members of 1,024 tokens took 0.82 (0.80 to 0.92), and 0.99
of the memory. With rank 16 on TPU v5e, 8 members of 128 tokens read and write 0.59 GB each, one
member alone 1.92.

Examples:
    python -m experiments.sweeps.figures
    python -m experiments.sweeps.figures --members 4 --batch-size 32 --rounds 6
    python -m experiments.sweeps.figures --target v5e:2x2 --rank 16
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dora_jax.ops import cheap_ways_alone
from experiments.benchmarks.ahead_of_time import WITHOUT_VMEM_PREFETCH, target_mesh
from experiments.benchmarks.cases import LLAMA_7B, BlocksShape, Case, bert, blocks
from experiments.benchmarks.device_runs import compiled_figures
from experiments.benchmarks.timing import time_in_turn
from experiments.sweeps.members import Member
from experiments.sweeps.program import Programs, Schedule
from experiments.sweeps.stack import Stack
from experiments.sweeps.task import Batch, Scores, Split
from experiments.trainer.command_line import in_one_line, settings
from experiments.trainer.memory import keep_freed_memory

if TYPE_CHECKING:
    from jaxtyping import Array, Float


BLOCK = BlocksShape(**dataclasses.asdict(dataclasses.replace(LLAMA_7B, num_hidden_layers=1)))
"""One block of LLaMA-7B, without the head, which nobody adapts."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what members cost together and alone."""

    # Members in one program.
    members: int = 8
    # Texts in the batch of each member.
    batch_size: int = 4
    # Tokens of a text.
    length: int = 24
    # Any of full, lora, dora and the other methods of the trainer.
    method: str = "dora"
    # Rank of the adapters.
    rank: int = 8
    # Timed steps, after those that compile.
    rounds: int = 12

    # A TPU topology, such as v5e:2x2 (needs libtpu), or cpu: count bytes there, and time nothing.
    target: str | None = None
    # Tokens of each member in the programs for a target.
    target_tokens: tuple[int, ...] = (128,)


@dataclasses.dataclass(frozen=True)
class CaseTask:
    """A case of the benchmarks as a task without an evaluation; its model may be abstract."""

    case: Case
    abstract: bool = False
    name: str = "case"
    base: str = "random"
    metric: str = "none"
    max_length: int = 0
    train_examples: int = 0

    @property
    def fields(self) -> Mapping[str, Any]:
        """The layers of the case."""
        return {"target_modules": self.case.adapter.targets}

    def model(self, seed: int) -> nnx.Module:
        """Returns the model of the case, the same for every seed."""
        return self.case.abstract() if self.abstract else self.case.build()

    def example_call(self) -> tuple[Any, ...]:
        """Returns the ids of the batch."""
        return (self.case.batch["input_ids"],)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Returns the batch of the case, with other tokens for each step and seed."""
        rng = np.random.default_rng(seed)
        for _ in itertools.count():
            own = {name: rng.permutation(x.ravel()) for name, x in self.case.batch.items()}
            yield {name: x.reshape(self.case.batch[name].shape) for name, x in own.items()}

    def loss(
        self, model: nnx.Module, batch: Any
    ) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
        """Returns the loss of the case."""
        return self.case.loss(model, batch), {}

    def predict(self, model: nnx.Module, batch: Any) -> Float[Array, "row ..."]:
        """Returns the outputs of the case."""
        return self.case.outputs(model, batch)

    def eval_batches(self, split: Split) -> Sequence[Batch]:
        """There are none."""
        return ()

    def score(self, split: Split, outputs: np.ndarray) -> Scores:
        """There is nothing to score."""
        raise NotImplementedError("a case of the benchmarks has no examples")


def members_of(config: Config) -> list[Member]:
    """Returns members of different seeds and rates."""
    return [
        Member(
            method=config.method,
            rank=config.rank,
            alpha=2.0 * config.rank,
            batch_size=config.batch_size,
            learning_rate=1e-4 * 2 ** (seed % 4),
            seed=seed,
        )
        for seed in range(config.members)
    ]


def measure(config: Config, case: Case) -> dict[str, Any]:
    """Times steps of all members together, and of one after the other, in turn.

    Returns:
        The ratio of the times (median and quartiles over the rounds), that of the temporary memory
        of all members to that of one, and the largest relative difference of a loss.
    """
    task, members = CaseTask(case), members_of(config)
    stack, schedule = Stack(task, members), Schedule(steps=1000)
    together, alone = Programs(stack, schedule), Programs(stack, schedule)
    data = [task.batches(m.seed, m.batch_size) for m in members]
    at_hand: list[list[Batch]] = []
    losses: dict[str, list[np.ndarray]] = {"together": [], "alone": []}
    states: dict[str, Any] = {
        "together": together.start(members),
        "alone": [alone.start([m]) for m in members],
    }

    def batches(name: str) -> list[Batch]:  # the same for both
        step = len(losses[name])
        while len(at_hand) <= step:
            at_hand.append([next(own) for own in data])
        return at_hand[step]

    def all_at_once() -> None:
        own = batches("together")
        states["together"], outcomes = together.step(states["together"], members, own)
        losses["together"].append(np.asarray(outcomes.loss))

    def one_by_one() -> None:
        found = []
        for i, batch in enumerate(batches("alone")):
            states["alone"][i], outcomes = alone.step(states["alone"][i], [members[i]], [batch])
            found.append(np.asarray(outcomes.loss))
        losses["alone"].append(np.concatenate(found))

    calls = {"together": all_at_once, "alone": one_by_one}
    times = time_in_turn(calls, rounds=config.rounds, warm_up=2)
    ratio = times["together"].over(times["alone"])
    first, second = (np.array(losses[name]) for name in ("together", "alone"))
    memory = together.temporary_bytes[len(members)], alone.temporary_bytes[1]
    return {
        "seconds_together": times["together"].median,
        "seconds_alone": times["alone"].median,
        "time_ratio": ratio.median,
        "time_ratio_quartiles": ratio.quartiles,
        "temporary_bytes": memory,
        "memory_ratio": memory[0] / (len(members) * memory[1]),
        "steps": len(first),
        "largest_loss_difference": float(np.max(np.abs(first / second - 1))),
    }


def count_bytes(config: Config, tokens: int, shape: BlocksShape = BLOCK) -> dict[str, float]:
    """Compiles one block for one chip of the target, and counts bytes for each member, in GB.

    Returns:
        Bytes accessed of one member alone, of each of all members, and the ratio.
    """
    assert config.target is not None
    case = blocks(shape, tokens=tokens, rank=config.rank, dtype=jnp.bfloat16)
    task, members = CaseTask(case, abstract=True), members_of(config)
    programs = Programs(Stack(task, members), Schedule(steps=1000))
    chip = Mesh(target_mesh(config.target).devices.flat[:1], ("member",))
    everywhere = NamedSharding(chip, PartitionSpec())
    found = []
    for own in (members[:1], members):
        batches = [next(task.batches(m.seed, 1)) for m in own]
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            programs.abstract(own, batches),
        )
        with cheap_ways_alone():
            lowered = jax.jit(programs.steps, donate_argnums=0).lower(*placed)
        # Without the prefetch every operand is counted once.
        options: Any = WITHOUT_VMEM_PREFETCH if "TPU" in chip.devices.flat[0].device_kind else None
        figures = compiled_figures(lowered.compile(compiler_options=options))
        found.append(figures["bytes_accessed"] / 1e9 / len(own))
    return {"alone": found[0], "together": found[1], "ratio": found[1] / found[0]}


def run(config: Config) -> str:
    """Measures, and returns the figures as lines."""
    count = config.members
    if config.target:
        jax.config.update("jax_platforms", "cpu")  # compiling needs no device
        lines = [
            f"{config.method} r{config.rank}, one LLaMA-7B block, one chip of "
            f"{config.target}, GB a member and step:"
        ]
        for tokens in config.target_tokens:
            found = count_bytes(config, tokens)
            lines.append(
                f"{tokens} tokens: {found['alone']:.3f} alone, {found['together']:.3f} of {count} "
                f"together, ratio {found['ratio']:.3f}"
            )
        return "\n".join(lines)
    case = bert(texts=config.batch_size, length=config.length, rank=config.rank)
    own = measure(config, case)
    low, high = own["time_ratio_quartiles"]
    together, alone = (x / 1e6 for x in own["temporary_bytes"])
    return "\n".join(
        [
            f"{config.method}, {case.title}, {count} members, {jax.devices()[0].device_kind}:",
            f"time {own['time_ratio']:.3f} of separate steps (quartiles {low:.3f} to {high:.3f}, "
            f"{config.rounds} rounds): {own['seconds_together']:.3f} s, {own['seconds_alone']:.3f}",
            f"temporary memory {own['memory_ratio']:.3f} of {count} times that of one: "
            f"{together:.1f} MB, {alone:.1f}",
            f"losses of {own['steps']} steps differ by {own['largest_loss_difference']:.1e} at "
            "most, relatively",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the settings from the command line and runs."""
    keep_freed_memory()
    config = settings(Config, __doc__, arguments)
    with in_one_line("Nothing is kept: run the command again."):
        print(run(config))


if __name__ == "__main__":
    main()
