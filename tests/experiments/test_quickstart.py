"""The quickstart end to end on a tiny budget, whole and interrupted."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dora_jax as dora
from experiments import quickstart
from experiments.models.huggingface import load_bert
from experiments.tasks.metrics import read_metrics
from tests.experiments.tiny_task import tiny_task


def _adapter(folder: Path) -> dict[str, np.ndarray]:
    tree = dora.checkpoint.read_adapters(folder / "adapter").adapters
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def check_run(folder, summary, printed):
    """Checks a run's files and messages, and that its adapter did what the summary says."""
    assert summary["step_0_max_difference"] == 0.0
    assert summary["merge_max_difference"] <= 1e-5
    low, high = summary["test_accuracy_95"]
    assert low < summary["test_accuracy"] < high
    assert json.loads((folder / "summary.json").read_text())["jax"] == jax.__version__
    for picture in ("curves.png", "layers.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("events.*"))
    assert [m["split"] for m in read_metrics(folder)] == ["train", "train", "validation", "test"]
    for text in ("Test accuracy", "95 %", "trainable parameters", str(folder), "Next:"):
        assert text in printed
    saved = dora.checkpoint.read_adapters(folder / "adapter").config
    assert saved.modules_to_save == ("classifier",)


def changed_kernels(folder, checkpoint):
    """How many parameters of the encoder the run changed, all of them kernels."""
    before, after = (dict(nnx.to_flat_state(nnx.state(load_bert(f)))) for f in (checkpoint, folder))
    changed = [p for p, x in before.items() if not np.array_equal(x[...], after[p][...])]
    assert all(path[-1] == "kernel" for path in changed)
    return len(changed)


def trainable(layers, hidden, intermediate, rank):
    """Parameters of the adapters of an encoder, and of a head of two classes."""
    factors = layers * rank * (4 * (hidden + hidden) + 2 * (hidden + intermediate))
    magnitudes = layers * (4 * hidden + intermediate + hidden)
    return {"factors": factors, "magnitude": magnitudes, "saved": 2 * hidden + 2}


def check_trainable(summary, **expected):
    counts = summary["trainable_parameters"]
    assert counts["lora_a"] + counts["lora_b"] == expected["factors"]
    assert (counts["magnitude"], counts["saved"]) == (expected["magnitude"], expected["saved"])


@pytest.fixture
def as_users_compile():
    """Compiled quickly, the plain and the adapted encoder may round a sum in two ways."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("as_users_compile")
def test_it_adapts_an_encoder_and_leaves_what_it_says(tiny_checkpoint, tmp_path, capsys):
    folder = tmp_path / "run"
    config = quickstart.Config(
        run_folder=folder,
        checkpoint=tiny_checkpoint,
        train_examples=64,
        epochs=1,
        max_length=16,
    )
    folder.mkdir()  # an earlier attempt was interrupted before its first checkpoint
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.5}\n')
    summary = quickstart.run(config)
    check_run(folder, summary, capsys.readouterr().out)
    check_trainable(summary, **trainable(layers=1, hidden=32, intermediate=64, rank=8))
    assert changed_kernels(folder / "merged", tiny_checkpoint) == 6
    with pytest.raises(SystemExit, match="finished run"):
        quickstart.run(config)


@pytest.mark.full
def test_it_adapts_the_real_encoder(minilm, tmp_path, capsys):
    folder = tmp_path / "run"
    config = quickstart.Config(run_folder=folder, train_examples=64, epochs=1, max_length=16)
    summary = quickstart.run(config)
    check_run(folder, summary, capsys.readouterr().out)
    check_trainable(summary, **trainable(layers=6, hidden=384, intermediate=1536, rank=8))
    assert changed_kernels(folder / "merged", minilm) == 36


SETTINGS = {
    "train_examples": 320,
    "batch_size": 8,
    "epochs": 1,
    "checkpoint_every": 5,
    "max_length": 16,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    quickstart.run(quickstart.Config(run_folder=folder, checkpoint=tiny_checkpoint, **SETTINGS))
    return folder


@pytest.mark.full
def test_two_processes_come_to_what_one_comes_to(whole, tiny_checkpoint, tmp_path):
    settings = {"checkpoint": tiny_checkpoint, "mesh": "fsdp=2", **SETTINGS}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.quickstart", f"--run-folder={tmp_path}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen([*command, *arguments], env={**shared, "JAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found, one = (json.loads((f / "summary.json").read_text()) for f in (tmp_path, whole))
    for name in ("frozen_probe_accuracy", "test_accuracy", "test_loss"):
        np.testing.assert_allclose(found[name], one[name], rtol=1e-4)
    assert found["step_0_max_difference"] <= 1e-7  # programs compiled quickly may round apart
    assert found["merge_max_difference"] <= 1e-5
    assert changed_kernels(tmp_path / "merged", tiny_checkpoint) == 6
    for picture in ("curves.png", "layers.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_and_resumed_ends_bit_for_bit_like_an_unbroken_one(
    number, whole, tiny_checkpoint, tmp_path
):
    settings, broken = {"checkpoint": tiny_checkpoint, **SETTINGS}, tmp_path / "broken"
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.quickstart", f"--run-folder={broken}", *arguments]
    quick = str(jax.config.read("jax_disable_most_optimizations"))  # one way to compile for both
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": quick}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 240
        while not _steps_written(broken) >= 12:
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline, "it did not get to step 12"
            time.sleep(0.01)
        process.send_signal(number)
        printed = process.stderr.read()
    assert not (broken / "summary.json").exists()
    summary = quickstart.run(quickstart.Config(run_folder=broken, **settings))
    resumed = summary["resumed_from_step"]
    assert 0 < resumed < 40
    if number == signal.SIGKILL:
        assert resumed % 5 == 0
    else:
        end = f"Terminated at step {resumed}, which is saved. To go on, give the same options with "
        assert process.returncode == 128 + number
        assert printed.splitlines()[-1] == f"{end}--run-folder {broken}"

    one, other = _adapter(whole), _adapter(broken)
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name
    assert read_metrics(whole) == read_metrics(broken)


def _steps_written(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"train"') if file.exists() else 0


@pytest.mark.full
def test_a_run_stopped_before_its_first_checkpoint_or_at_its_end_goes_on(tmp_path, monkeypatch):
    """Steps that are taken again have the same metrics, and the test line is written once."""
    config, task = quickstart.Config(epochs=1, batch_size=4), tiny_task()
    adapter = dora.DoRAConfig(rank=2, modules_to_save=["classifier"])

    def train(folder):
        model = dora.apply_dora(task.model(0), adapter, rngs=nnx.Rngs(2))
        return quickstart._train(config, adapter, model, task, folder)

    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("experiments.trainer.classification.evaluate", stop)
        with pytest.raises(InterruptedError):
            train(tmp_path)
    first = read_metrics(tmp_path)
    assert [line["split"] for line in first] == 5 * ["train"]
    one = train(tmp_path)
    lines = read_metrics(tmp_path)
    assert lines[:5] == first and [line["split"] for line in lines[5:]] == ["validation", "test"]
    other = train(tmp_path)  # all was done but what follows the training
    assert read_metrics(tmp_path) == lines
    assert (one["resumed_from_step"], other["resumed_from_step"]) == (0, 5)
    assert other["seconds_per_step"] is None and other["test_loss"] == one["test_loss"]


def test_a_second_run_in_the_folder_is_refused_and_a_killed_one_leaves_it_free(tmp_path):
    code = """if True:
        import sys, time
        from pathlib import Path
        from experiments.trainer.run_folder import alone_in
        with alone_in(Path(sys.argv[1])):
            print("in", flush=True)
            time.sleep(100)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(SystemExit, match="another process is running in"):
            quickstart.run(quickstart.Config(run_folder=tmp_path))
        process.kill()
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match="finished run"):
        quickstart.run(quickstart.Config(run_folder=tmp_path))


def test_a_run_of_other_settings_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="other settings"):
        quickstart.run(quickstart.Config(run_folder=tmp_path))
