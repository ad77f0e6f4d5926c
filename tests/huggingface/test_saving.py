"""Writing the parameters of a model as a checkpoint folder of Hugging Face."""

from __future__ import annotations

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from dora_jax.huggingface import CheckpointError, SaveOptions, load_checkpoint, save_checkpoint
from dora_jax.names import NameMap
from tests.support.checkpoints import (
    NAMES,
    WIDTH,
    Model,
    abstract,
    filled,
    saved,
    tensors,
    write,
)

STACKED = pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])


@pytest.mark.parametrize("max_file_bytes", [200, 600, 10**9])
@STACKED
def test_what_is_saved_is_what_was_read(tmp_path, stacked, max_file_bytes):
    stored = tensors(ml_dtypes.bfloat16)
    model = load_checkpoint(write(tmp_path / "in", stored), abstract(stacked, jnp.bfloat16), NAMES)
    save_checkpoint(
        tmp_path / "out", model, NAMES, options=SaveOptions(max_file_bytes=max_file_bytes)
    )
    found = saved(tmp_path / "out")
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert ("model.safetensors" in files) == (max_file_bytes == 10**9)
    again = load_checkpoint(tmp_path / "out", abstract(not stacked, jnp.bfloat16), NAMES)
    np.testing.assert_array_equal(again.head.kernel[...], model.head.kernel[...])
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & (tmp_path / "in").stat().st_mode


def test_companions_of_the_source_are_copied_and_its_dtype_follows(tmp_path):
    source = write(tmp_path / "in", tensors())
    config = {"torch_dtype": "float32", "hidden_size": WIDTH, "text": "ä"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("no")
    model = load_checkpoint(source, abstract(), NAMES)
    extra = {"score.weight": np.ones((2, 3), np.float32)}
    save_checkpoint(
        tmp_path / "out",
        model,
        NAMES,
        source=source,
        extra=extra,
        options=SaveOptions(jnp.bfloat16),
    )
    out = tmp_path / "out"
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "tokenizer.json", "model.safetensors"}
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    assert {value.dtype for value in saved(out).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert "score.weight" in saved(out)
    save_checkpoint(tmp_path / "same", model, NAMES, source=source)
    assert (tmp_path / "same/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_weights_are_replaced_only_when_asked_and_then_wholly(tmp_path):
    model = load_checkpoint(write(tmp_path / "in", tensors()), abstract(), NAMES)
    out = tmp_path / "out"
    save_checkpoint(out, model, NAMES, options=SaveOptions(max_file_bytes=300))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        save_checkpoint(out, model, NAMES)
    save_checkpoint(out, model, NAMES, options=SaveOptions(overwrite=True))
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "notes.txt"}
    with pytest.raises(CheckpointError, match="is read from"):
        save_checkpoint(out, model, NAMES, source=out, options=SaveOptions(overwrite=True))


def test_nothing_is_left_where_saving_fails(tmp_path):
    model = filled(Model)
    model.head.kernel[...] = np.full((WIDTH, 2), np.nan, np.float32)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN"):
        save_checkpoint(tmp_path / "out", model, NAMES)
    with pytest.raises(CheckpointError, match=r"wte\.weight: two values"):
        save_checkpoint(tmp_path / "out", filled(Model), NAMES, extra={"wte.weight": np.ones(2)})
    with pytest.raises(CheckpointError, match=r"embed\.embedding is a shape without a value"):
        save_checkpoint(tmp_path / "out", abstract(), NAMES)
    assert not list(tmp_path.iterdir())


def test_an_adapted_model_is_refused_and_a_merged_one_saved(tmp_path):
    model = filled(Model)
    config = dora.DoRAConfig(rank=2, target_modules=["head"])
    adapted = dora.apply_dora(model, config, rngs=nnx.Rngs(1))
    for act in (load_checkpoint, save_checkpoint):
        with pytest.raises(dora.errors.AdapterError, match="adapted"):
            act(tmp_path, adapted, NAMES)
    save_checkpoint(tmp_path / "out", dora.merge(adapted), NAMES)
    merged = load_checkpoint(tmp_path / "out", abstract(), NAMES)
    np.testing.assert_array_equal(merged.head.kernel[...], model.head.kernel[...])


@STACKED
def test_neither_reading_nor_saving_holds_a_second_copy(tmp_path, stacked):
    mb, layers = 2**20, 12
    kernel = np.zeros((512, 512), np.float32)  # 1 MB
    names = NameMap({"layers.{i}.up": "h.{i}.up"})
    write(tmp_path / "in", {f"h.{i}.up.weight": kernel + i for i in range(layers)}, 3)
    like = jax.ShapeDtypeStruct(((layers,) if stacked else ()) + kernel.shape, jnp.float32)
    up = {"up": {"kernel": like}}
    params = {"layers": up if stacked else {str(i): up for i in range(layers)}}
    tracemalloc.start()  # counts the arrays of NumPy, which JAX takes over without a copy
    try:
        loaded = load_checkpoint(tmp_path / "in", params, names)
        assert tracemalloc.get_traced_memory()[1] < (layers + 3) * mb
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        save_checkpoint(tmp_path / "out", loaded, names, options=SaveOptions(max_file_bytes=2 * mb))
        assert tracemalloc.get_traced_memory()[1] - before < 3.2 * mb
    finally:
        tracemalloc.stop()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == layers / 2
