from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

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
from tests.support.models import LinenChain, NNXChain, chain_params, inputs, with_values

CONFIG = dora.DoRAConfig(rank=2, dropout=0.2)
WIDTHS = (6, 5, 4)
X, Y = inputs(3, 6), inputs(3, 4, seed=3)


def nnx_run(config=CONFIG, seed=0):
    base = NNXChain(WIDTHS, rngs=nnx.Rngs(0))
    nnx.update(base, with_values(base, chain_params(WIDTHS, seed=seed)))
    model = dora.apply_dora(base, config, rngs=nnx.Rngs(1))
    return model, nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)


@nnx.jit
def nnx_step(model, optimizer):
    def loss_fn(model):
        return jnp.mean((model(X) - Y) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
    optimizer.update(model, grads)
    return loss


def everything(model, optimizer):
    return jax.tree.map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        (nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(optimizer))),
    )


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def trained():
    """The state of an NNX run after each of its steps, by step."""
    model, optimizer = nnx_run()
    states = {0: everything(model, optimizer)}
    for step in range(1, 9):
        nnx_step(model, optimizer)
        states[step] = everything(model, optimizer)
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4; to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    model, optimizer = nnx_run()
    with Checkpoints(folder, CONFIG) as checkpoints:
        for step in range(1, 5):
            nnx_step(model, optimizer)
            if step % 2 == 0:
                checkpoints.save(step, model, optimizer, metrics={"loss": 1 / step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_a_resumed_nnx_run_ends_as_an_unbroken_one(folder, trained):
    model, optimizer = nnx_run()
    with Checkpoints(folder, CONFIG) as checkpoints:
        restored = checkpoints.restore(model, optimizer)
    assert restored.step == 4 and restored.adapters is model and restored.state is optimizer
    assert_same(everything(model, optimizer), trained[4])
    for _ in range(4):
        nnx_step(model, optimizer)
    assert_same(everything(model, optimizer), trained[8])


def test_a_resumed_linen_run_ends_as_an_unbroken_one(tmp_path):
    module, params, tx = LinenChain(WIDTHS), chain_params(WIDTHS), dora.dora_optimizer(1e-2)
    model, start = dora.apply_dora(
        module, CONFIG, params=params, rng=jax.random.key(1), inputs=(X,)
    )

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
    keys = {"a": jax.random.key(1), "b": jax.random.split(jax.random.key(2, impl="rbg"), 3)}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, model, keys)
        other = {"a": jax.random.key(0), "b": jax.random.split(jax.random.key(0, impl="rbg"), 3)}
        restored = checkpoints.restore(model, other).state
        assert_same(
            jax.tree.map(jax.random.key_data, restored), jax.tree.map(jax.random.key_data, keys)
        )
        assert jax.random.uniform(restored["b"][1]) == jax.random.uniform(keys["b"][1])
        with pytest.raises(dora.errors.AdapterError, match=r"state\.b is key<fry>.*key<rbg>"):
            checkpoints.restore(model, {**other, "b": jax.random.split(jax.random.key(0), 3)})


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


def test_steps_go_up(folder):
    model, optimizer = nnx_run()
    with Checkpoints(folder, CONFIG) as checkpoints:
        for step in (3, 4):
            with pytest.raises(dora.errors.AdapterError, match="has a checkpoint of step 4"):
                checkpoints.save(step, model, optimizer)


def test_a_diverged_run_does_not_displace_its_checkpoints(folder):
    model, optimizer = nnx_run()
    model.layer_0.magnitude[...] *= jnp.nan
    with Checkpoints(folder, CONFIG) as checkpoints:
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0\.magnitude is not finite"):
            checkpoints.save(5, model, optimizer)
        assert checkpoints.steps() == [2, 4]


def test_adapters_are_restored_without_the_optimiser_and_by_layer(folder, trained):
    model, optimizer = nnx_run()
    before = everything(model, optimizer)
    with Checkpoints(folder, CONFIG) as checkpoints:
        checkpoints.restore(model, step=2)
    after = everything(model, optimizer)
    assert_same(after, (trained[2][0], before[1]))
    fresh = nnx_run()[0]
    some = load(folder / "4", fresh, only=["layer_1"])
    assert_same(everything(some, optimizer)[0]["layer_0"], before[0]["layer_0"])
    np.testing.assert_array_equal(some.layer_1.lora_a[...], trained[4][0]["layer_1"]["lora_a"])
    with pytest.raises(CheckpointError, match=r"name one, such as .*checkpoints/4"):
        load(folder, fresh)


def test_another_base_model_or_optimiser_is_refused(folder):
    model, _ = nnx_run()
    with Checkpoints(folder, CONFIG) as checkpoints:
        with pytest.raises(dora.errors.AdapterError, match=r"layer_0: .*another base"):
            checkpoints.restore(nnx_run(seed=1)[0])
        assert checkpoints.restore(nnx_run(seed=1)[0], allow_base_mismatch=True).step == 4
        other = nnx.Optimizer(model, optax.sgd(0.1), wrt=dora.DoRAParam)
        with pytest.raises(dora.errors.AdapterError, match=r"state\.opt_state.*more"):
            checkpoints.restore(model, other)
        wider = nnx_run(dora.DoRAConfig(rank=3, dropout=0.2))
        with pytest.raises(dora.errors.AdapterError, match=r"lora_a is float32 \(6, 3\).*\(6, 2\)"):
            checkpoints.restore(*wider)
    for settings in (dict(alpha=8.0), dict(normalize=False)):
        other = nnx_run(dora.DoRAConfig(rank=2, dropout=0.2, **settings))
        with Checkpoints(folder, CONFIG) as checkpoints, pytest.raises(dora.errors.AdapterError):
            checkpoints.restore(*other)


def damage(folder, kind, rng, first):
    """Damages the checkpoint in a folder in one of several ways."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    # Some of Orbax's files are not needed to read; the first draw is one that is.
    file = folder / "metadata" / "metadata" if first else rng.choice(files)
    content = file.read_bytes()
    if kind == "removed":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: rng.randrange(max(1, len(content)))])
    elif kind == "flipped" and content:
        at = rng.randrange(len(content))
        file.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
    elif kind == "folder":
        folders = sorted(p for p in folder.rglob("*") if p.is_dir())
        shutil.rmtree(folder / "arrays" if first else rng.choice(folders))
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize("best", [None, "loss"])
@pytest.mark.parametrize("kind", ["removed", "truncated", "flipped", "folder", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    saved, tmp_path, trained, kind, best
):
    rng, found = random.Random(f"{kind}{best}"), set()
    for number in range(1 if kind == "empty" else 6):
        folder = Path(shutil.copytree(saved, tmp_path / str(number)))
        damage(folder / "4", kind, rng, first=number == 0)
        model, optimizer = nnx_run()
        with Checkpoints(folder, CONFIG, best=best) as checkpoints:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step = checkpoints.restore(model, optimizer).step
            assert_same(everything(model, optimizer), trained[step])
            said = [str(w.message) for w in caught if "skipping" in str(w.message)]
            assert bool(said) == (step == 2) and all(str(folder / "4") in text for text in said)
            assert checkpoints.latest_step() == step
            # The run goes on, and saves the step anew; what was damaged is kept beside.
            if step == 2:
                checkpoints.save(4, model, optimizer, metrics={"loss": 0.5})
                checkpoints.wait()
                assert checkpoints.steps() == [2, 4]
                assert (folder / "damaged-4-0").is_dir()
                assert checkpoints.restore(model, optimizer).step == 4
        found.add(step)
    assert 2 in found


def test_where_no_checkpoint_is_good_nothing_is_made_up(folder):
    model, optimizer = nnx_run()
    before = everything(model, optimizer)
    for step in (2, 4):
        shutil.rmtree(folder / str(step) / "arrays")
    with Checkpoints(folder, CONFIG) as checkpoints, pytest.warns(UserWarning, match="skipping"):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints is good.*/4"):
            checkpoints.restore(model, optimizer)
        with pytest.raises(CheckpointError):
            checkpoints.restore(model, optimizer, step=2)
    assert_same(everything(model, optimizer), before)


def test_what_a_killed_process_left_is_no_checkpoint(folder, trained):
    left = shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp-1790000000000000000")
    shutil.rmtree(Path(left) / "arrays")
    model, optimizer = nnx_run()
    with Checkpoints(folder, CONFIG) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.restore(model, optimizer).step == 4
        assert Path(left).exists()  # it might be another process's, which is writing it
        assert_same(everything(model, optimizer), trained[4])
        checkpoints.save(6, model, optimizer)
        checkpoints.wait()
        assert not Path(left).exists() and checkpoints.steps() == [4, 6]


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


def run_python(code, *args, devices=1, **variables):
    """Runs a program on so many CPU devices; returns what it printed."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARDED_RUN = """
import sys, jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dora_jax as dora
from dora_jax.checkpoint import load, save
from dora_jax.checkpoint import Checkpoints

folder, *numbers = sys.argv[1], *map(int, sys.argv[2:])
config = dora.DoRAConfig(rank=4)

def sharded(node, mesh):
    def place(x):
        divides = x.ndim and x.shape[0] % mesh.size == 0
        return jax.device_put(x, NamedSharding(mesh, P("model") if divides else P()))
    nnx.update(node, jax.tree.map(place, nnx.state(node)))
    return node

@nnx.jit
def step(model, optimizer):
    loss = lambda model: (model(np.ones((2, 16), np.float32)) ** 2).mean()
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
    optimizer.update(model, grads)

def shardings(*nodes):
    return [x.sharding for node in nodes for x in jax.tree.leaves(nnx.state(node))]

def values(*nodes):
    trees = [nnx.to_pure_dict(nnx.state(node)) for node in nodes]
    leaves = jax.tree_util.tree_flatten_with_path(trees)[0]
    return {jax.tree_util.keystr(k): np.asarray(x).tolist() for k, x in leaves}

for number in numbers:
    mesh = Mesh(np.array(jax.devices()[:number]), ("model",))
    base = sharded(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), mesh)
    model = sharded(dora.apply_dora(base, config, rngs=nnx.Rngs(1)), mesh)
    optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)
    optimizer = sharded(optimizer, mesh)
    placed = shardings(model, optimizer)
    assert len(model.lora_a[...].sharding.device_set) == number
    with Checkpoints(folder + "/run", config) as checkpoints:
        if number == 4:
            step(model, optimizer)
            checkpoints.save(1, model, optimizer)
            save(folder + "/adapter", model, config)
            print(values(model, optimizer))
            continue
        checkpoints.restore(model, optimizer)
    assert shardings(model, optimizer) == placed
    loaded = load(folder + "/adapter", base)
    assert len(loaded.lora_a[...].sharding.device_set) == number
    np.testing.assert_array_equal(loaded.lora_a[...], model.lora_a[...])
    print(values(model, optimizer))
    step(model, optimizer)  # goes on, on these devices
"""


def test_what_was_saved_sharded_is_restored_on_another_number_of_devices(tmp_path):
    saved = run_python(SHARDED_RUN, tmp_path, 4, devices=4)
    assert "magnitude" in saved
    assert run_python(SHARDED_RUN, tmp_path, 2, 1, devices=2) == 2 * saved


KILLED_RUN = """
import os, random, select, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import dora_jax as dora
from dora_jax.adapters.trees import flatten
from dora_jax.checkpoint import Checkpoints

def run(folder, total, every, say):
    config = dora.DoRAConfig(rank=2, dropout=0.1)
    model = dora.apply_dora(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, dora.dora_optimizer(1e-2), wrt=dora.DoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean((model(x) - 1) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, dora.DoRAParam))(model)
        optimizer.update(model, grads)

    class Data:
        position = 0
        def get_state(self):
            return {"position": self.position}
        def set_state(self, state):
            self.position = state["position"]
        def __next__(self):
            self.position += 1
            return np.random.default_rng(self.position).normal(size=(3, 6)).astype(np.float32)

    data = Data()
    with Checkpoints(folder, config, best="loss") as checkpoints:
        restored = checkpoints.restore(model, optimizer, data=data)
        first = restored.step if restored else 0
        say(f"start {first}")
        for number in range(first + 1, total + 1):
            step(model, optimizer, next(data))
            if number % every == 0:
                checkpoints.save(number, model, optimizer, data=data, metrics={"loss": 1 / number})
                say(f"saving {number}")
    values = nnx.state(model, dora.DoRAParam), nnx.state(optimizer), data.position
    say(f"end {[np.asarray(x).tolist() for x in flatten(values).values()]}")

# Processes are forked before JAX starts a backend, which saves them its import.
def start(*args):
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, os.fdopen(reader)
    try:
        run(*args, lambda line: os.write(writer, f"{line}\\n".encode()))
    finally:
        os._exit(0)

folder, rng = sys.argv[1], random.Random(0)
_, lines = start(folder + "/unbroken", 400, 400)
unbroken = lines.read().splitlines()[-1]
for _ in range(20):
    pid, lines = start(folder + "/killed", 400, 3)
    for _ in range(rng.randrange(1, 6)):
        line = lines.readline()
        print(line.strip(), flush=True)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the run had ended before it was killed"
_, lines = start(folder + "/killed", 400, 3)
ended = lines.read().splitlines()
print(ended[0])
assert unbroken.startswith("end") and ended[-1] == unbroken, (ended[-1], unbroken)
"""


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_an_unbroken_one(tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    lines = run_python(KILLED_RUN, tmp_path, **cache).splitlines()
    starts = [int(line.split()[1]) for line in lines if line.startswith("start")]
    assert len(starts) == 21 and starts == sorted(starts)
    assert starts[-1] >= 30, "the kills left no progress"
