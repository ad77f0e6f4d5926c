"""Training runs resumed from their checkpoints: equal to unbroken ones, or refused."""

from __future__ import annotations

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.checkpoint import Checkpoints, load
from dora_jax.errors import CheckpointError
from tests.checkpoint.runs import (
    CONFIG,
    WIDTHS,
    X,
    Y,
    assert_same,
    everything,
    nnx_chain,
    nnx_run,
    nnx_step,
)
from tests.support.models import LinenChain, chain_params


def test_a_resumed_nnx_run_ends_as_an_unbroken_one(run_folder, trained):
    model, optimizer = nnx_run()
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        restored = checkpoints.restore(model, optimizer)
    assert restored.step == 4 and restored.adapters is model and restored.state is optimizer
    assert_same(everything(model, optimizer), trained[4])
    for _ in range(4):
        nnx_step(model, optimizer)
    assert_same(everything(model, optimizer), trained[8])


def test_the_norms_of_a_resumed_run_are_those_it_had(tmp_path):
    """Another device may sum them in another order."""
    model, _ = nnx_run()
    norm = np.nextafter(np.asarray(model.layer_0.base_norm[...]), np.float32(np.inf))
    model.layer_0.base_norm[...] = norm
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, model)
        fresh, _ = nnx_run()
        checkpoints.restore(fresh)
    np.testing.assert_array_equal(fresh.layer_0.base_norm[...], norm)


def linen_run():
    return dora.apply_dora(
        LinenChain(WIDTHS),
        CONFIG,
        params=chain_params(WIDTHS),
        rng=jax.random.key(1),
        inputs=(X,),
    )


@pytest.mark.full
def test_a_resumed_linen_run_ends_as_an_unbroken_one(tmp_path):
    params, tx, (model, start) = chain_params(WIDTHS), dora.dora_optimizer(1e-2), linen_run()

    @jax.jit
    def step(adapters, state):
        key, own = jax.random.split(state["key"])

        def loss_fn(adapters):
            variables = {"params": params, "dora": adapters}
            return jnp.mean((model.apply(variables, X, rngs={"dropout": own}) - Y) ** 2)

        updates, opt = tx.update(jax.grad(loss_fn)(adapters), state["opt"], adapters)
        return optax.apply_updates(adapters, updates), {"opt": opt, "key": key}

    adapters, state = start, {"opt": tx.init(start), "key": jax.random.key(3)}
    with Checkpoints(tmp_path, model) as checkpoints:
        assert checkpoints.restore(adapters, state) is None
        for number in range(1, 7):
            adapters, state = step(adapters, state)
            if number == 3:
                checkpoints.save(number, adapters, state, data={"next": 9})
    with Checkpoints(tmp_path, model) as checkpoints:
        fresh = {"opt": tx.init(start), "key": jax.random.key(0)}
        restored = checkpoints.restore(start, fresh)
    assert (restored.step, restored.data) == (3, {"next": 9})
    again = restored.adapters, restored.state
    for _ in range(3):
        again = step(*again)
    assert jax.tree.structure(again) == jax.tree.structure((adapters, state))
    key, expected = again[1].pop("key"), state.pop("key")
    assert (jax.random.key_data(key) == jax.random.key_data(expected)).all()
    assert_same(again, (adapters, state))


def test_random_keys_of_any_implementation_come_back(tmp_path):
    model, _ = nnx_run()
    keys = {
        "a": jax.random.key(1, impl="threefry2x32"),
        "b": jax.random.split(jax.random.key(2, impl="rbg"), 3),
    }
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, model, keys)
        other = {
            "a": jax.random.key(0, impl="threefry2x32"),
            "b": jax.random.split(jax.random.key(0, impl="rbg"), 3),
        }
        restored = checkpoints.restore(model, other).state
        assert_same(
            jax.tree.map(jax.random.key_data, restored), jax.tree.map(jax.random.key_data, keys)
        )
        assert jax.random.uniform(restored["b"][1]) == jax.random.uniform(keys["b"][1])
        with pytest.raises(dora.errors.AdapterError, match=r"state\.b is key<fry>.*key<rbg>"):
            checkpoints.restore(
                model, {**other, "b": jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)}
            )


def batches():
    return iter(grain.MapDataset.range(20).shuffle(seed=3).repeat().to_iter_dataset())


class BytesIterator:
    """An iterator whose state is bytes, as a `grain.DataLoader`'s is."""

    def __init__(self):
        self.position = 0

    def get_state(self):
        return bytes([self.position, 255])

    def set_state(self, state):
        self.position = state[0]


def test_the_position_in_the_data_comes_back(tmp_path):
    model, _ = nnx_run()
    data, plain = batches(), BytesIterator()
    for _ in range(7):
        next(data)
    plain.position = 7
    with Checkpoints(tmp_path / "grain", CONFIG) as checkpoints:
        checkpoints.save(7, model, data=data)
        following = [next(data) for _ in range(30)]
        again = batches()
        checkpoints.restore(model, data=again)
        assert [next(again) for _ in range(30)] == following
    with Checkpoints(tmp_path / "bytes", CONFIG) as checkpoints:
        checkpoints.save(7, model, data=plain)
        plain.position = 0
        assert checkpoints.restore(model, data=plain).data == b"\x07\xff"
        assert plain.position == 7
        for bad in ({1: 2}, {"x": np.ones(3)}, {"x": object()}):
            with pytest.raises(dora.errors.AdapterError, match="JSON"):
                checkpoints.save(8, model, data=bad)


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, _ = nnx_run()
    losses = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 4.0, 6: 6.0}
    with Checkpoints(tmp_path, CONFIG, keep=2, best="loss", keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, model, metrics={"loss": loss})
            checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 5, 6]
        with pytest.raises(dora.errors.AdapterError, match="finite 'loss'"):
            checkpoints.save(7, model)
    with Checkpoints(tmp_path, CONFIG, keep=1, best="loss", mode="max") as checkpoints:
        checkpoints.save(7, model, metrics={"loss": 5.5})
        checkpoints.wait()
        assert checkpoints.steps() == [6, 7]
        assert checkpoints.restore(model, step=6).step == 6


def test_steps_go_up(run_folder):
    model, optimizer = nnx_run()
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        for step in (3, 4):
            with pytest.raises(dora.errors.AdapterError, match="has a checkpoint of step 4"):
                checkpoints.save(step, model, optimizer)


def test_a_diverged_run_does_not_displace_its_checkpoints(run_folder):
    model, optimizer = nnx_run()
    model.layer_0.magnitude[...] *= jnp.nan
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0\.magnitude is not finite"):
            checkpoints.save(5, model, optimizer)
        assert checkpoints.steps() == [2, 4]


def test_adapters_are_restored_without_the_optimiser_and_by_layer(run_folder, trained):
    model, optimizer = nnx_run()
    before = everything(model, optimizer)
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        checkpoints.restore(model, step=2)
    after = everything(model, optimizer)
    assert_same(after, (trained[2][0], before[1]))
    fresh = nnx_run()[0]
    some = load(run_folder / "4", fresh, only=["layer_1"])
    assert_same(everything(some, optimizer)[0]["layer_0"], before[0]["layer_0"])
    np.testing.assert_array_equal(some.layer_1.lora_a[...], trained[4][0]["layer_1"]["lora_a"])
    with pytest.raises(CheckpointError, match=r"name one, such as .*checkpoints/4"):
        load(run_folder, fresh)


def test_another_base_model_or_optimiser_is_refused(run_folder):
    model, _ = nnx_run()
    with Checkpoints(run_folder, CONFIG) as checkpoints:
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0: .*another base"):
            checkpoints.restore(nnx_run(seed=1)[0])
        assert checkpoints.restore(nnx_run(seed=1)[0], allow_base_mismatch=True).step == 4
        other = nnx.Optimizer(model, optax.sgd(0.1), wrt=dora.DoRAParam)
        with pytest.raises(dora.errors.AdapterError, match=r"state\.opt_state.*more"):
            checkpoints.restore(model, other)
        for settings, message in (
            (dict(rank=3), r"lora_a is float32 \(6, 3\).*\(6, 2\)"),
            (dict(alpha=8.0), "layer_0: the model has scaling 4.0, .* has 8.0"),
            (dict(normalize=False), "layer_0: the model has normalize False"),
        ):
            config = dora.DoRAConfig(**{"rank": 2, "dropout": 0.2, **settings})
            # Abstract arrays are enough to be refused.
            wrong = nnx.eval_shape(lambda config=config: nnx_run(config))
            with pytest.raises(dora.errors.AdapterError, match=message):
                checkpoints.restore(*wrong)


def test_a_run_is_of_one_front_end(run_folder):
    """An NNX run needs its configuration; the adapters of a `DoRAModel` are its own tree."""
    model, optimizer = nnx_run()
    linen_model, _ = linen_run()
    for config, given, message in (
        (linen_model, model, "saved with its DoRAConfig"),
        (CONFIG, nnx_chain(WIDTHS, chain_params(WIDTHS)), "no adapter: apply_dora first"),
    ):
        with Checkpoints(run_folder, config) as checkpoints:
            with pytest.raises(dora.errors.AdapterError, match=message):
                checkpoints.save(5, given, optimizer)
            with pytest.raises(dora.errors.AdapterError, match=message):
                checkpoints.restore(given, optimizer)


def test_either_front_end_restores_the_adapters_of_the_other(run_folder, trained):
    model, start = linen_run()
    with Checkpoints(run_folder, model) as checkpoints:
        restored = checkpoints.restore(start)
    tree = jax.tree.map(np.asarray, restored.adapters)
    assert_same(tree, {k: {n: trained[4][0][k][n] for n in own} for k, own in tree.items()})
    assert restored.model.config is model.config


def test_what_is_saved_in_the_background_may_be_donated_at_once(tmp_path):
    model, _ = nnx_run()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    tree = {"big": jnp.ones((600, 700)), "small": jnp.arange(5.0)}
    with Checkpoints(tmp_path, CONFIG, keep=5) as checkpoints:
        for number in range(1, 6):
            tree = step(tree)
            checkpoints.save(number, model, tree)
        tree = step(tree)
        checkpoints.wait()
        for number in range(1, 6):
            value = checkpoints.restore(model, tree, step=number).state["big"]
            np.testing.assert_array_equal(value, np.full((600, 700), 2.0 ** (number + 1) - 1))
