"""Members that are trained in one program end where they would have alone."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dora_jax.decomposition import QuantizedKernel
from experiments.sweeps.members import Member, MembersError
from experiments.sweeps.program import Programs, Schedule
from experiments.sweeps.stack import Stack
from experiments.trainer.methods import METHODS
from experiments.trainer.step import TrainStep
from tests.experiments.sweeps.tiny_sweep import tiny_sweep_task
from tests.experiments.tiny_task import tiny_task

STEPS = 8
TASK = tiny_sweep_task()
MEMBERS = [
    Member(learning_rate=rate, seed=seed, rank=rank, alpha=alpha, batch_size=4, **more)
    for rate, seed, rank, alpha, more in (
        (1e-2, 0, 4, 8.0, {}),
        (3e-2, 1, 1, 3.0, {"magnitude_lr_ratio": 1.0}),
        (2e-3, 2, 3, 6.0, {"magnitude_weight_decay": 0.3}),
    )
]


def alone(member):
    """The losses of a member in the trainer that all other experiments use."""
    method = METHODS[member.method]
    sizes = {"rank": member.rank, "alpha": member.alpha or 1.0}
    fields = {**TASK.fields, **dict(member.switches)}
    model = method.adapt(TASK.model(member.seed), **sizes, seed=1000 + member.seed, fields=fields)
    rates = Schedule(steps=STEPS).over_peak()
    tx = method.optimizer(
        lambda step: member.learning_rate * rates(step),
        member.magnitude_lr_ratio,
        member.magnitude_weight_decay,
    )
    model.train()
    step = TrainStep(model, nnx.Optimizer(model, tx, wrt=method.trainable), TASK.loss)
    batches = TASK.batches(member.seed, member.batch_size)
    losses = [float(step(next(batches)).loss) for _ in range(STEPS)]
    step.write_back()
    return losses, jax.tree.leaves(nnx.state(model, method.trainable))


def together(members):
    programs = Programs(Stack(TASK, members), Schedule(steps=STEPS))
    data = [TASK.batches(member.seed, member.batch_size) for member in members]
    state, losses = programs.start(members), []
    for _ in range(STEPS):
        state, outcomes = programs.step(state, members, [next(own) for own in data])
        losses.append(np.asarray(outcomes.loss))
    return programs, state, np.array(losses).T


@pytest.fixture(scope="module")
def trained():
    return together(MEMBERS)


def test_members_have_the_losses_and_arrays_of_separate_runs(trained):
    programs, state, losses = trained
    for i, member in enumerate(MEMBERS):
        expected, arrays = alone(member)
        np.testing.assert_allclose(losses[i], expected, rtol=1e-6)
        for found, array in zip(
            programs.stack.arrays_of(member, state.trained, i), arrays, strict=True
        ):
            np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "switches"),
    [
        ("full", ()),
        ("magnitude", ()),
        ("lora", (("use_rslora", True),)),
        ("dora", (("init", "pissa"),)),
        ("dora-detached", (("eps", 1e-4),)),
    ],
)
def test_so_have_members_of_every_method(method, switches):
    own = [
        Member(method=method, rank=2, alpha=4.0, batch_size=4, seed=seed, switches=switches)
        for seed in (0, 1)
    ]
    programs, state, losses = together(own)
    for i, member in enumerate(own):
        expected, arrays = alone(member)
        np.testing.assert_allclose(losses[i], expected, rtol=1e-6)
        for found, x in zip(
            programs.stack.arrays_of(member, state.trained, i), arrays, strict=True
        ):
            np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_ranks_that_were_padded_stay_exactly_zero(trained):
    programs, state, _ = trained
    for name, stack in zip(programs.stack.names(), state.trained, strict=True):
        for member, x in zip(MEMBERS, np.asarray(stack), strict=True):
            if "lora_a" in name or "lora_b" in name:
                own, padding = np.split(x, [member.rank], axis=1 if "lora_a" in name else 0)
                assert own.any() and not padding.any()


def test_all_rates_seeds_alphas_and_ranks_have_one_program(trained):
    programs = trained[0]
    assert programs.compilations == 2  # the start of the optimiser, and the step
    assert len({member.family(TASK) for member in MEMBERS}) == 1


def test_members_of_other_shapes_are_no_family():
    other = dataclasses.replace(MEMBERS[0], batch_size=8)
    with pytest.raises(MembersError, match="share method"):
        Stack(TASK, [MEMBERS[0], other])


def test_a_base_that_depends_on_the_seed_is_refused():
    task = dataclasses.replace(TASK, task=tiny_task(train=32))
    stack = Stack(task, MEMBERS)
    with pytest.raises(MembersError, match="frozen arrays of seeds 0 and 1 differ"):
        stack.start(MEMBERS[:2])


def test_members_on_a_quantised_base_share_its_codes():
    quantized = [dataclasses.replace(m, base="int8", magnitude_lr_ratio=1.0) for m in MEMBERS[:2]]
    programs, _, losses = together(quantized)
    frozen = nnx.to_flat_state(programs.stack.parts.frozen)
    codes = {path for path, x in frozen if isinstance(x.get_value(), QuantizedKernel)}
    assert len(codes) == len({path[:-1] for path, _ in adapters_of(programs)})
    _, _, plain = together([dataclasses.replace(m, base="float") for m in quantized])
    assert 0 < np.abs(losses - plain).max() < 0.05


def adapters_of(programs):
    parts = nnx.to_flat_state(programs.stack.parts.trained)
    return [(path, x) for path, x in parts if path[-1] == "lora_a"]


def test_a_base_is_named_in_the_folder_and_cannot_be_trained():
    assert Member(base="nf4", rank=4, alpha=8.0).name() == "dora_r4_lr-0.001_seed-0_base-nf4"
    assert "base" not in Member().settings()
    with pytest.raises(MembersError, match="full trains the kernels"):
        Member(method="full", base="nf4")
    with pytest.raises(MembersError, match="unknown base 'int3'"):
        Member(base="int3")
