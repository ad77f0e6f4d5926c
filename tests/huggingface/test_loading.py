"""Reading checkpoint folders of Hugging Face into the parameters of either front end.

Agreement with transformers' own models is in tests/experiments/models/test_huggingface.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from dora_jax.decomposition import KernelAxes
from dora_jax.huggingface import CheckpointError, TensorRules, load_checkpoint, save_checkpoint
from dora_jax.huggingface.files import assign
from dora_jax.huggingface.loading import aligned_empty
from dora_jax.huggingface.parameters import Parameter
from dora_jax.names import HFModule, Interleaved, NameMap
from tests.support.checkpoints import (
    LAYERS,
    NAMES,
    Model,
    abstract,
    expected,
    filled,
    flat,
    saved,
    tensors,
    write,
)

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
STACKED = pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])


@STACKED
@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_parameter_is_its_tensor_whatever_the_dtype_and_number_of_files(
    tmp_path, stacked, files, dtype
):
    stored = tensors(dtype)
    model = load_checkpoint(write(tmp_path, stored, files), abstract(stacked), NAMES)
    found, wanted = flat(model), expected(stored, stacked)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], value.astype(np.float32), err_msg=path)


@STACKED
def test_parameters_are_cast_to_the_models_dtype_rounded_once(tmp_path, stacked):
    stored = tensors()
    model = load_checkpoint(write(tmp_path, stored), abstract(stacked, jnp.bfloat16), NAMES)
    for path, value in expected(stored, stacked).items():
        np.testing.assert_array_equal(flat(model)[path], value.astype(jnp.bfloat16), err_msg=path)


def test_the_given_model_stays_as_it_is(tmp_path):
    model = filled(Model)
    before = flat(model)
    loaded = load_checkpoint(write(tmp_path, tensors()), model, NAMES)
    for path, value in flat(model).items():
        np.testing.assert_array_equal(value, before[path])
    assert nnx.graphdef(loaded) == nnx.graphdef(model)
    assert not np.array_equal(flat(loaded)["head.kernel"], before["head.kernel"])
    assert not loaded.head.kernel[...].committed  # as those of the model


@pytest.mark.parametrize("boxed", [False, True])
def test_a_linen_tree_is_filled_in_its_own_structure(tmp_path, boxed):
    init = nn.initializers.lecun_normal()
    init = nn.with_partitioning(init, (None, "model")) if boxed else init
    module = nn.Sequential([nn.Dense(3, kernel_init=init), nn.Dense(2, kernel_init=init)])
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    names = NameMap({"layers_{i}": "net.{i}.fc"})
    rng = np.random.default_rng(0)
    stored = {
        "net.0.fc.weight": rng.normal(size=(3, 4)),
        "net.0.fc.bias": rng.normal(size=3),
        "net.1.fc.weight": rng.normal(size=(2, 3)),
        "net.1.fc.bias": rng.normal(size=2),
    }
    loaded = load_checkpoint(write(tmp_path / "in", stored), params, names)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    x = rng.normal(size=(5, 4))
    hidden = x @ stored["net.0.fc.weight"].T + stored["net.0.fc.bias"]
    wanted = hidden @ stored["net.1.fc.weight"].T + stored["net.1.fc.bias"]
    np.testing.assert_allclose(module.apply({"params": loaded}, x), wanted, atol=1e-5)
    save_checkpoint(tmp_path / "out", loaded, names)
    for name, value in saved(tmp_path / "out").items():
        np.testing.assert_allclose(value, stored[name], rtol=1e-6)


def test_axes_of_heads_are_flattened_as_torch_has_them(tmp_path):
    """An attention's kernels are (in, heads, features) and (heads, features, out)."""
    model = filled(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs))
    names = NameMap({name: f"attn.{name}" for name in ("query", "key", "value", "out")})
    save_checkpoint(tmp_path, model, names)
    stored = saved(tmp_path)
    for name in ("query", "key", "value"):
        kernel = np.asarray(getattr(model, name).kernel[...])
        np.testing.assert_array_equal(stored[f"attn.{name}.weight"], kernel.reshape(8, 8).T)
        assert stored[f"attn.{name}.bias"].shape == (8,)
    kernel = np.asarray(model.out.kernel[...])
    np.testing.assert_array_equal(stored["attn.out.weight"], kernel.reshape(8, 8).T)
    read = load_checkpoint(tmp_path, nnx.eval_shape(lambda: model), names)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read), nnx.state(model))
    tree = nnx.to_pure_dict(nnx.state(model))  # without the layers their axes must be given
    heads, out = KernelAxes((), (0,), (1, 2)), KernelAxes((), (0, 1), (2,))
    axes = {f"{n}.kernel": heads for n in ("query", "key", "value")} | {"out.kernel": out}
    read = load_checkpoint(tmp_path, tree, names, axes=axes)
    jax.tree.map(np.testing.assert_array_equal, read, tree)


def test_features_in_another_rotary_order_are_moved_both_ways(tmp_path):
    names = NAMES | {"layers.{i}.up": HFModule("h.{i}.up", features=Interleaved(head_dim=4))}
    stored = tensors()
    model = load_checkpoint(write(tmp_path / "in", stored), abstract(True), names)
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    for i in range(LAYERS):
        rows = stored[f"h.{i}.up.weight"][order]
        np.testing.assert_array_equal(model.layers.up.kernel[i], rows.T)
        np.testing.assert_array_equal(model.layers.up.bias[i], stored[f"h.{i}.up.bias"][order])
    save_checkpoint(tmp_path / "out", model, names)
    for name, value in saved(tmp_path / "out").items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_batch_statistics_are_parameters_too(tmp_path):
    model = filled(lambda rngs: nnx.Sequential(nnx.BatchNorm(3, rngs=rngs)))
    rng = np.random.default_rng(0)
    keys = ("weight", "bias", "running_mean", "running_var")
    stored = {f"bn.{key}": rng.uniform(1, 2, 3).astype(np.float32) for key in keys}
    names = NameMap({"layers.0": "bn"})
    counter = {"bn.num_batches_tracked": np.array(7)}
    folder = write(tmp_path, stored | counter)
    rules = TensorRules(unused={r".*num_batches_tracked": "not needed"})
    loaded = load_checkpoint(folder, model, names, rules=rules)
    layer = loaded.layers[0]
    found = (layer.scale, layer.bias, layer.mean, layer.var)
    for key, variable in zip(keys, found, strict=True):
        np.testing.assert_array_equal(variable[...], stored[f"bn.{key}"])


def sharded_in_a_process_of_four_devices(folder):
    """Run in a process of its own: loads stacked parameters over a mesh and checks every shard."""
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    stored = load_file(folder / "model.safetensors")
    specs = {
        "embed.embedding": P("x", "y"),
        "head.kernel": P("y"),
        "layers.up.kernel": P(None, "x", "y"),
        "layers.up.bias": P(),
        "layers.norm.scale": P(None, ("x", "y")),
    }
    model = abstract(True)
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    state = nnx.state(model)
    tree = nnx.from_flat_state(
        [(path, shardings[".".join(path)]) for path, _ in nnx.to_flat_state(state)]
    )
    own = abstract(True)
    for path, x in nnx.to_flat_state(nnx.state(own)):
        x.set_value(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[".".join(path)]))
    for loaded in (
        load_checkpoint(folder, model, NAMES, shardings=tree),
        load_checkpoint(folder, own, NAMES),
    ):
        wanted = expected(stored, True)
        for path, variable in nnx.to_flat_state(nnx.state(loaded)):
            array, path = variable.get_value(), ".".join(path)
            assert array.sharding == shardings[path], path
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, wanted[path][shard.index])
    replicated = load_checkpoint(folder, model, NAMES, shardings=NamedSharding(mesh, P()))
    assert replicated.head.kernel[...].sharding.is_fully_replicated
    save_checkpoint(folder / "saved", loaded, NAMES)
    for name, value in load_file(folder / "saved" / "model.safetensors").items():
        np.testing.assert_array_equal(value, stored[name])
    stage = NamedSharding(jax.make_mesh((3,), ("stage",), devices=jax.devices()[:3]), P("stage"))
    tree["layers"] = jax.tree.map(lambda x: stage, tree["layers"])
    loaded = load_checkpoint(folder, model, NAMES, shardings=tree)
    np.testing.assert_array_equal(loaded.layers.up.kernel[...], wanted["layers.up.kernel"])


@pytest.mark.full
def test_each_device_gets_its_shard(tmp_path):
    write(tmp_path, tensors())
    code = (
        "import pathlib, sys; from tests.huggingface import test_loading as t; "
        "t.sharded_in_a_process_of_four_devices(pathlib.Path(sys.argv[1]))"
    )
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | environment
    )


def test_one_sharding_serves_all(tmp_path):
    device = jax.devices()[0]
    folder = write(tmp_path, tensors())
    model = load_checkpoint(folder, abstract(), NAMES, shardings=SingleDeviceSharding(device))
    assert model.head.kernel[...].committed
    with pytest.raises(CheckpointError, match=r"shardings has none for embed\.embedding"):
        load_checkpoint(folder, abstract(), NAMES, shardings={"head": {"kernel": None}})


@pytest.mark.parametrize("shape", [(), (5,), (300, 7), (7, 300), (2, 3, 600)])
def test_a_copy_in_blocks_is_a_copy(shape):
    source = np.random.default_rng(0).normal(size=shape[::-1]).T
    target = np.empty(shape, np.float32)
    assign(target, source)
    np.testing.assert_array_equal(target, source.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_on_a_cpu_a_buffer_becomes_the_array_without_a_copy(dtype):
    for size in range(1, 40, 7):
        buffer = aligned_empty((3, size), dtype)
        array = Parameter("x", buffer).place({...: buffer})
        assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_a_bar_is_drawn_when_asked_for(tmp_path, capsys):
    load_checkpoint(write(tmp_path, tensors()), abstract(), NAMES, progress=True)
    assert "100%" in capsys.readouterr().err
    load_checkpoint(tmp_path, abstract(), NAMES)
    assert not capsys.readouterr().err


def test_a_scalar_is_read_and_written(tmp_path):
    params = {"a": {"scale": jnp.zeros(())}}
    names = NameMap({"a": "x"})
    stored = {"x.weight": np.array(2.5, np.float32)}
    loaded = load_checkpoint(write(tmp_path, stored), params, names)
    assert loaded["a"]["scale"] == 2.5
    save_checkpoint(tmp_path / "out", loaded, names)
    np.testing.assert_array_equal(saved(tmp_path / "out")["x.weight"], 2.5)
