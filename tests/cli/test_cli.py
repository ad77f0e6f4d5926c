from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import dora_jax as dora
from dora_jax.checkpoint import load, read_adapters, save
from dora_jax.cli import main
from dora_jax.names import IDENTITY, LLAMA
from dora_jax.peft import save_pretrained
from tests.support.models import NNXChain, random_adapters

pytest.importorskip("tyro")

FIXTURES = Path(__file__).parents[1] / "fixtures"
LLAMA_BASE = FIXTURES / "llama" / "llama3"
PEFT_FOLDER = FIXTURES / "peft"
PEFT = sorted(path.name for path in PEFT_FOLDER.iterdir())


@pytest.fixture
def run(capsys):
    """Returns a function that runs a command; it returns the status, what was printed, errors."""

    def command(*args):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


@pytest.fixture
def done(run):
    """Returns a function that runs a command, which has to succeed; it returns what it printed."""

    def command(*args):
        status, out, errors = run(*args)
        assert status == 0, errors
        return json.loads(out) if "--json" in args else out

    return command


def chain(config, seed=1):
    model = dora.apply_dora(NNXChain((24, 40, 17), rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(5))
    dora.set_adapters(model, random_adapters(dora.get_adapters(model), seed))
    return model


CONFIG = dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2})


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "adapter", chain(CONFIG), CONFIG)
    return tmp_path / "adapter"


def folded(weight, a, b, magnitude, scaling, kind):
    """Returns W' of a torch weight, in float64, from PEFT's tensors as their documentation says."""
    w, a, b = (np.asarray(x).astype(np.float64) for x in (weight, a, b))
    delta = (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(
        b.shape[0], *a.shape[1:]
    )
    delta = scaling * (delta.T if kind in ("transposed", "embedding") else delta)
    v = w + delta
    if magnitude is None:
        return v
    inputs = (0,) if kind in ("transposed", "embedding") else tuple(range(1, w.ndim))
    n = np.sqrt(np.square(v).sum(inputs, keepdims=True))
    shape = [1 if i in inputs else size for i, size in enumerate(w.shape)]
    return np.asarray(magnitude).astype(np.float64).reshape(shape) * v / n


def peft_base(name, folder):
    """Writes the base of one of PEFT's fixtures as a Hugging Face folder; returns its tensors."""
    reference = load_file(PEFT_FOLDER / name / "reference.safetensors")
    tensors = {k[5:]: x for k, x in reference.items() if k.startswith("base.")}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ids = {"position_ids": np.arange(7)}  # a buffer of integers, as older checkpoints have them
    save_file({**tensors, **ids}, folder / "model.safetensors")
    return {**tensors, **ids}


def expected_merge(base, adapter):
    """Returns the merged tensors, and the names of those that a PEFT folder changes."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    merged, changed = dict(base), set()
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.")
        for part, kind in ((".lora_A.weight", "linear"), (".lora_embedding_A", "embedding")):
            if name.endswith(part):
                module = name.removesuffix(part)
                weight = base[f"{module}.weight"]
                b = tensors[key.replace("_A", "_B")]
                rank = a.shape[0]
                kind = "transposed" if kind == "linear" and config["fan_in_fan_out"] else kind
                alpha = next(
                    (
                        v
                        for k, v in config["alpha_pattern"].items()
                        if module.endswith(k.lstrip("^"))
                    ),
                    config["lora_alpha"],
                )
                scaling = alpha / (np.sqrt(rank) if config["use_rslora"] else rank)
                m = tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
                merged[f"{module}.weight"] = folded(weight, a, b, m, scaling, kind)
                changed.add(f"{module}.weight")
        if "lora_" not in name and ".base_layer." not in name:
            merged[name] = a
            changed.add(name)
    return merged, changed


@pytest.mark.parametrize("name", PEFT)
def test_merge_gives_the_weights_that_peft_computes_with(name, tmp_path, done):
    base = peft_base(name, tmp_path / "base")
    adapter = PEFT_FOLDER / name
    expected, changed = expected_merge(base, adapter)
    report = done("merge", tmp_path / "base", adapter, tmp_path / "merged", "--json")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert set(report["merged"]) | set(report["replaced"]) == changed
    assert (tmp_path / "merged" / "config.json").exists()
    for key, x in merged.items():
        assert x.dtype == base[key].dtype
        if key in changed:
            np.testing.assert_allclose(x, expected[key], rtol=2e-6, atol=2e-7, err_msg=key)
        else:
            np.testing.assert_array_equal(x, base[key])


def test_merge_of_several_files_in_bfloat16(tmp_path, done, run):
    """The base lies in three files, the result in more; what bfloat16 rounds away is said."""
    base = {}
    for file in LLAMA_BASE.glob("model-*.safetensors"):
        base |= load_file(file)
    adapter, rng = tmp_path / "adapter", np.random.default_rng(0)
    module, other = "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"
    write_peft(adapter, base, {module: 4, other: 4}, rng)
    report = done(
        *("merge", LLAMA_BASE, adapter, tmp_path / "merged", "--max-file-bytes", 8000, "--json")
    )
    assert report["merged"] == sorted([f"{module}.weight", f"{other}.weight"])
    assert report["copied"] == len(base) - 2
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert (tmp_path / "merged" / "config.json").read_text() == (
        LLAMA_BASE / "config.json"
    ).read_text()
    expected, _ = expected_merge(base, adapter)
    merged = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    for name, x in merged.items():
        assert x.dtype == ml_dtypes.bfloat16
        close = dict(rtol=2**-8, atol=0) if name in report["merged"] else dict(rtol=0, atol=0)
        np.testing.assert_allclose(
            x.astype(np.float64), np.asarray(expected[name]).astype(np.float64), **close
        )
    assert 0 < report["rounded_away"][module] < 0.1
    status, out, _ = run("merge", LLAMA_BASE, adapter, tmp_path / "again")
    assert status == 0 and "rounds away up to" in out


def write_peft(folder, base, ranks, rng):
    """Writes an adapter of some modules of a base as PEFT would."""
    tensors = {}
    for module, rank in ranks.items():
        out, inner = base[f"{module}.weight"].shape
        norm = np.linalg.norm(base[f"{module}.weight"].astype(np.float64), axis=1)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": rng.normal(size=(rank, inner)),
            f"base_model.model.{module}.lora_B.weight": 0.01 * rng.normal(size=(out, rank)),
            f"base_model.model.{module}.lora_magnitude_vector": norm * rng.uniform(0.8, 1.2, out),
        }
    config = {
        "peft_type": "LORA",
        "use_dora": True,
        "r": max(ranks.values()),
        "lora_alpha": 8,
        "target_modules": list(ranks),
        "rank_pattern": {f"^{k}": r for k, r in ranks.items() if r != max(ranks.values())},
        "alpha_pattern": {},
        "use_rslora": False,
        "fan_in_fan_out": False,
    }
    folder.mkdir()
    save_file(
        {k: x.astype(np.float32) for k, x in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def llama_adapter(tmp_path):
    base = {}
    for file in LLAMA_BASE.glob("model-*.safetensors"):
        base |= load_file(file)
    ranks = {
        f"model.layers.{i}.{m}": i + 2 for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")
    }
    write_peft(tmp_path / "peft", base, ranks, np.random.default_rng(1))
    return tmp_path / "peft"


def test_convert_there_and_back_keeps_every_bit(llama_adapter, tmp_path, done):
    done("convert", llama_adapter, tmp_path / "orbax", "--names", "llama", "--base", LLAMA_BASE)
    saved = read_adapters(tmp_path / "orbax")
    q = saved.adapters["layers"]["1"]["self_attn"]["q_proj"]
    tensors = load_file(llama_adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj."
    np.testing.assert_array_equal(q["lora_a"], tensors[f"{prefix}lora_A.weight"].T)
    np.testing.assert_array_equal(q["magnitude"], tensors[f"{prefix}lora_magnitude_vector"])
    assert saved.config.layer_settings(("layers", "0", "mlp", "up_proj")).rank == 2
    assert len(saved.base) == 4
    done("convert", tmp_path / "orbax", tmp_path / "back", "--names", "llama", "--base", LLAMA_BASE)
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x)
    one, other = (
        done("merge", LLAMA_BASE, adapter, tmp_path / f"merged_{i}", *names, "--json")
        for i, (adapter, names) in enumerate(
            ((llama_adapter, ()), (tmp_path / "orbax", ("--names", "llama")))
        )
    )
    assert one["merged"] == other["merged"]
    for name, x in load_file(tmp_path / "merged_0" / "model.safetensors").items():
        np.testing.assert_array_equal(
            load_file(tmp_path / "merged_1" / "model.safetensors")[name].view(np.uint16),
            x.view(np.uint16),
        )


BERT_NAMES = ("bert", "--flax-prefix", "encoder", "--hf-prefix", "bert")


@pytest.mark.parametrize(
    "name, names, with_base",
    [
        ("llama", ("llama",), True),
        ("llama_lora", ("llama",), False),
        ("llama_some", ("llama",), True),
        ("bert", (*BERT_NAMES, "--extra-names", "classifier=classifier"), True),
        ("convolutions", ("identity",), True),
        ("attention", ("identity",), True),
    ],
)
def test_what_peft_wrote_converts_there_and_back(name, names, with_base, tmp_path, done):
    adapter = PEFT_FOLDER / name
    peft_base(name, tmp_path / "base")
    base = ("--base", tmp_path / "base") if with_base else ()
    done("convert", adapter, tmp_path / "orbax", *base, "--names", *names)
    done("convert", tmp_path / "orbax", tmp_path / "back", *base, "--names", *names)
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back")
    )
    assert other.keys() == {key for key in one if ".base_layer." not in key}
    for key, x in other.items():
        np.testing.assert_array_equal(x, one[key])
    for folder in (adapter, tmp_path / "back"):
        done("merge", tmp_path / "base", folder, tmp_path / f"merged_{folder.name}")
    one, other = (load_file(tmp_path / f"merged_{n}" / "model.safetensors") for n in (name, "back"))
    for key, x in one.items():
        np.testing.assert_array_equal(x, other[key])


def test_an_adapter_that_a_model_was_trained_with_converts_as_the_library_writes_it(
    folder, tmp_path, done
):
    """The command, which has no model, writes what `dora_jax.peft` writes with one."""
    for number, config in enumerate(
        (
            CONFIG,
            dora.DoRAConfig(rank=3, decompose=False, exclude_modules=["layer_1"]),
            dora.DoRAConfig(rank=2, init="pissa", use_rslora=True),
            dora.DoRAConfig(rank=2, modules_to_save=["layer_1"]),
        )
    ):
        model, one, other = chain(config), tmp_path / f"one{number}", tmp_path / f"other{number}"
        save(tmp_path / f"saved{number}", model, config)
        save_pretrained(model, one, IDENTITY)
        done("convert", tmp_path / f"saved{number}", other, "--names", "identity")
        config_file = "adapter_config.json"
        assert (one / config_file).read_text() == (other / config_file).read_text()
        done("diff", one, other)


def test_stacked_layers_convert_by_the_name_map(tmp_path, done):
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (2, 32, 2), "lora_b": (2, 2, 32), "magnitude": (2, 32)}
    layer = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = dora.DoRAConfig(rank=2, target_modules=["q_proj"])
    save(tmp_path / "a", config, {"layers": {"self_attn": {"q_proj": layer}}})
    done("convert", tmp_path / "a", tmp_path / "p", "--names", "llama")
    tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert LLAMA.find("layers.self_attn.q_proj").names((2,))[1] == "model.layers.1.self_attn.q_proj"
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], layer["lora_b"][1].T)


def test_another_base_is_refused_unless_it_is_meant(llama_adapter, tmp_path, run, done):
    done("convert", llama_adapter, tmp_path / "orbax", "--names", "llama", "--base", LLAMA_BASE)
    other = tmp_path / "other"
    shutil.copytree(LLAMA_BASE, other)
    for file in other.glob("*.safetensors"):
        save_file({k: x * np.asarray(1.5, x.dtype) for k, x in load_file(file).items()}, file)
    merge = ("merge", other, tmp_path / "orbax", tmp_path / "merged", "--names", "llama")
    status, out, errors = run(*merge)
    assert status == 1 and not out and errors.count("\n") == 1
    assert "up_proj: the adapter was trained for another base" in errors
    assert "pass --allow-base-mismatch" in errors
    assert not (tmp_path / "merged").exists()
    done(*merge, "--allow-base-mismatch")
    status, _, errors = run(
        "convert", tmp_path / "orbax", tmp_path / "p", *merge[-2:], "--base", other
    )
    assert status == 1 and "another base" in errors
    status, _, errors = run("merge", FIXTURES / "bert" / "bert_tiny", llama_adapter, tmp_path / "m")
    assert status == 1 and "no tensor model.layers" in errors
    assert not (tmp_path / "m").exists()


def test_inspect_shows_layers_and_how_far_magnitudes_moved(folder, done):
    report, model = done("inspect", folder, "--json"), chain(CONFIG)
    assert [row["path"] for row in report["layers"]] == ["layer_0", "layer_1"]
    row = report["layers"][1]
    assert (row["rank"], row["alpha"], row["scaling"]) == (2, 16.0, 8.0)
    norm = np.linalg.norm(np.asarray(model.layer_1.kernel[...], np.float64), axis=0)
    drift = np.abs(np.asarray(model.layer_1.magnitude[...]) - norm) / norm
    np.testing.assert_allclose(row["magnitude_drift_mean"], drift.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["magnitude_drift_max"], drift.max(), rtol=1e-5)
    a, b = (np.asarray(x[...], np.float64) for x in (model.layer_1.lora_a, model.layer_1.lora_b))
    np.testing.assert_allclose(row["product_norm"], 8 * np.linalg.norm(a @ b), rtol=1e-6)
    assert report["parameters"] == dora.adapters.count_parameters(dora.get_adapters(model))
    assert report["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert dora.DoRAConfig(**report["config"]) == CONFIG
    text = done("inspect", folder)
    assert "layer_1" in text and "Orbax" in text and f"{drift.mean():.2%}" in text


@pytest.mark.parametrize("name", PEFT)
def test_inspect_and_diff_read_what_peft_wrote(name, done):
    folder = PEFT_FOLDER / name
    report = done("inspect", folder, "--json")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert report["format"] == "peft"
    assert report["parameters"]["total"] == sum(x.size for x in tensors.values())
    assert all(row["magnitude_drift_mean"] is None for row in report["layers"])
    assert done("diff", folder, folder, "--json")["equal"]


def test_diff_tells_what_changed(folder, tmp_path, run):
    assert run("diff", folder, folder)[0] == 0
    model = chain(CONFIG)
    model.layer_0.magnitude[...] *= 1.1
    # The same product: factors that are scaled against each other.
    model.layer_0.lora_a[...] *= 4
    model.layer_0.lora_b[...] /= 4
    b = np.asarray(model.layer_1.lora_b[...])
    model.layer_1.lora_b[...] = b * 2
    save(tmp_path / "other", model, CONFIG)
    status, out, _ = run("diff", folder, tmp_path / "other", "--json")
    report = json.loads(out)
    assert status == 1 and not report["equal"]
    first, second = report["layers"]
    assert first["direction"] < 1e-12 and not first["equal"]
    np.testing.assert_allclose([first["magnitude"], first["magnitude_max"]], 0.1 / 1.1, rtol=1e-5)
    np.testing.assert_allclose(second["direction"], 0.5, rtol=1e-6)
    assert second["magnitude"] == 0
    status, text, _ = run("diff", folder, tmp_path / "other")
    assert status == 1 and "9.09%" in text


def test_diff_tells_settings_and_layers_apart(folder, tmp_path, run):
    others = {
        "alpha": dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, alpha=8.0),
        "fewer": dora.DoRAConfig(rank=3, target_modules=["layer_0"]),
        "normalize": dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, normalize=False),
    }
    for name, config in others.items():
        save(tmp_path / name, chain(config), config)
        status, out, _ = run("diff", folder, tmp_path / name, "--json")
        assert status == 1 and not json.loads(out)["equal"], name
    assert json.loads(run("diff", folder, tmp_path / "fewer", "--json")[1])["only_in_first"] == [
        "layer_1"
    ]
    dropout = dora.DoRAConfig(rank=3, rank_pattern={"layer_1": 2}, dropout=0.5)
    save(tmp_path / "dropout", chain(dropout), dropout)
    assert run("diff", folder, tmp_path / "dropout")[0] == 0  # only acts in training


def test_errors_are_one_line_and_statuses_are_those_of_the_help(folder, tmp_path, run):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "arrays")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"]}'
    )
    (pickled / "adapter_model.bin").write_bytes(b"")
    peft, identity = PEFT_FOLDER / "llama", ("--names", "identity")
    for status, args, message in (
        (1, ("inspect", tmp_path / "none"), "is not a folder"),
        (1, ("inspect", tmp_path / "empty"), "no checkpoint of dora_jax"),
        (1, ("inspect", broken), "damaged or incomplete"),
        (1, ("inspect", pickled), "pickle"),
        (2, ("diff", folder, broken), "damaged or incomplete"),
        (2, ("diff", folder, peft), "convert one of them"),
        (1, ("convert", PEFT_FOLDER / "gpt2", tmp_path / "o", *identity), "fan_in_fan_out"),
        (1, ("convert", folder, folder, "--names", "identity"), "exists"),
        (1, ("convert", folder, tmp_path / "p", "--names", "llama"), "name map"),
        (1, ("convert", peft, tmp_path / "o", "--names", "bert"), "name map"),
        (1, ("merge", LLAMA_BASE, folder, tmp_path / "m"), "--names"),
        (1, ("convert", folder, tmp_path / "p", "--names", "bert", "--extra-names", "a"), "pairs"),
        (1, ("merge", tmp_path / "none", peft, tmp_path / "m"), "is not a folder"),
        (1, ("merge", LLAMA_BASE, peft, LLAMA_BASE), "is read from"),
    ):
        given, out, errors = run(*args)
        assert (given, out, errors.count("\n")) == (status, "", 1), (args, errors)
        assert errors.startswith("dora-jax: ") and message in errors
    for args in ((), ("frobnicate",), ("inspect",), ("inspect", folder, "--yaml")):
        status, out, errors = run(*args)
        assert status == 2 and not out and errors


@pytest.mark.parametrize(
    "fields, drop, message",
    [
        ({"r": 2}, None, "makes its rank 2: the two files do not belong together"),
        ({"use_dora": False}, None, "lora_magnitude_vector is there although use_dora is False"),
        ({}, "lora_magnitude_vector", "lora_magnitude_vector is missing"),
        ({}, "lora_B.weight", "lora_B.weight is missing"),
        ({"alpha_pattern": 3}, None, "alpha_pattern"),
    ],
)
def test_merge_refuses_files_that_do_not_belong_together(
    llama_adapter, tmp_path, run, fields, drop, message
):
    config = llama_adapter / "adapter_config.json"
    content = json.loads(config.read_text()) | {"rank_pattern": {}} | fields
    config.write_text(json.dumps(content))
    file = llama_adapter / "adapter_model.safetensors"
    tensors = {k: x for k, x in load_file(file).items() if drop is None or not k.endswith(drop)}
    # One rank only, so that the configuration alone is what is wrong.
    save_file({k: x for k, x in tensors.items() if ".layers.1." in k}, file)
    status, _, errors = run("merge", LLAMA_BASE, llama_adapter, tmp_path / "merged")
    assert status == 1 and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "merged").exists()


def test_the_module_runs_as_a_command(folder):
    command = [sys.executable, "-m", "dora_jax", "inspect", str(folder), "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=FIXTURES.parents[1])
    assert printed.returncode == 0 and not printed.stderr
    assert json.loads(printed.stdout)["format"] == "orbax"


def test_without_tyro_the_command_says_what_to_install(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, _, errors = run("inspect", "x")
    assert status == 1 and "pip install 'dora-jax[cli]'" in errors


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in ("inspect", "diff", "convert", "merge"):
        assert command in out
        status, text, _ = run(command, "--help")
        assert status == 0 and "--json" in text


def test_a_converted_adapter_loads_into_a_model_without_a_warning(tmp_path, done):
    base = NNXChain((24, 40, 17), rngs=nnx.Rngs(0))
    tensors = {
        f"layer_{i}.weight": np.asarray(getattr(base, f"layer_{i}").kernel[...]).T for i in (0, 1)
    }
    write_peft(tmp_path / "peft", tensors, {"layer_0": 2, "layer_1": 3}, np.random.default_rng(0))
    (tmp_path / "base").mkdir()
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()},
        tmp_path / "base" / "model.safetensors",
    )
    args = ("convert", tmp_path / "peft", tmp_path / "orbax", "--names", "identity")
    done(*args, "--base", tmp_path / "base")
    loaded = load(tmp_path / "orbax", base)
    assert loaded.layer_1.lora_a.shape == (40, 3)
