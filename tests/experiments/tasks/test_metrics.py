from __future__ import annotations

import json
import math
import struct
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments.tasks.metrics import MetricsError, MetricsWriter, interval_95, read_metrics


def events(folder: Path) -> list[Event]:
    """Everything in the folder's event files: records of length, checksum, event, checksum."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            found.append(Event.FromString(content[position + 12 : position + 12 + length]))
            position += length + 16
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
    ]


def test_both_files_hold_what_was_written(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, "train", {"loss": 0.5, "tokens": 7})
        writer.write(1, "test", {"accuracy": 0.25})
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "split": "train", "loss": 0.5, "tokens": 7},
        {"step": 1, "split": "test", "accuracy": 0.25},
    ]
    assert scalars(tmp_path / "run") == [
        (1, "train/loss", 0.5),
        (1, "train/tokens", 7.0),
        (1, "test/accuracy", 0.25),
    ]


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        np.float32(0.5),
        np.array([0.5]),
        jnp.float32(0.5),
        jnp.array(0.5, jnp.bfloat16),
        jnp.array(0.5, jnp.float8_e4m3fn),
    ],
)
def test_any_float_is_a_json_number(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(np.int64(3), "train", {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 3, "split": "train", "loss": 0.5}\n'
    )


@pytest.mark.parametrize("value", [7, np.int32(7), jnp.array([7], jnp.uint8)])
def test_integers_stay_integers(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, "train", {"count": value})
    assert '"count": 7}' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("value", ["0.5", None, np.zeros(2), jnp.zeros((0,)), {"a": 1.0}, 1j])
def test_what_is_not_one_number_is_refused_and_nothing_is_written(tmp_path, value):
    with MetricsWriter(tmp_path) as writer, pytest.raises(MetricsError, match="'bad' must be"):
        writer.write(0, "train", {"good": 1.0, "bad": value})
    assert read_metrics(tmp_path) == []


def test_names_that_every_line_has_are_refused(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(MetricsError, match=r"\['step'\]"):
        writer.write(0, "train", {"step": 1.0})


def test_nan_and_infinity_are_null_and_noted_once_per_metric(tmp_path):
    with MetricsWriter(tmp_path) as writer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            writer.write(step, "train", {"loss": math.nan, "norm": jnp.inf, "rate": 0.5})
    noted = [str(warning.message) for warning in caught if "null in" in str(warning.message)]
    assert noted == [
        f"train {name} is {value} at step 0: null in metrics.jsonl (noted once per metric)"
        for name, value in [("loss", "nan"), ("norm", "inf")]
    ]
    assert read_metrics(tmp_path)[2] == {
        "step": 2,
        "split": "train",
        "loss": None,
        "norm": None,
        "rate": 0.5,
    }
    assert math.isnan(scalars(tmp_path)[0][2])


def test_a_line_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 0.5})
        assert len(read_metrics(tmp_path)) == 1


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def write(folder, steps, resume_step=None):
        with MetricsWriter(folder, resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, "train", {"loss": 1 / (step + 1)})

    write(tmp_path / "whole", range(6))
    write(tmp_path / "resumed", range(5))
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "split": "tr')  # killed while writing
    write(tmp_path / "resumed", range(3, 6), resume_step=3)
    whole, resumed = (
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "resumed")
    )
    assert resumed == whole
    # Nothing of the first part is overwritten; TensorBoard is told from where to forget it.
    assert [step for step, _, _ in scalars(tmp_path / "resumed")] == [0, 1, 2, 3, 4, 3, 4, 5]
    starts = [e.step for e in events(tmp_path / "resumed") if e.HasField("session_log")]
    assert starts == [3]


def test_new_run_does_not_write_over_an_old_one(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, "train", {"loss": 0.5})
    with pytest.raises(FileExistsError, match="resume"):
        MetricsWriter(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("malformed", ["", "3", '{"split": "train"}', '{"step": "1"}', "{"])
def test_malformed_line_is_named_and_the_file_is_left_as_it_was(tmp_path, malformed):
    good = json.dumps({"step": 0, "split": "train"})
    content = f"{good}\n{malformed}\n{good}\n"
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(MetricsError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == content


@pytest.mark.parametrize(("accuracy", "n"), [(0.0, 10), (0.5, 7), (0.87, 2000), (1.0, 50)])
def test_interval_ends_lie_1_96_of_their_own_standard_errors_away(accuracy, n):
    """Wilson's definition: p with (accuracy - p)^2 = z^2 p (1 - p) / n, found as roots."""
    z = 1.959963984540054
    roots = np.roots([1 + z**2 / n, -(2 * accuracy + z**2 / n), accuracy**2])
    assert interval_95(accuracy, n) == pytest.approx(sorted(roots.real), abs=1e-9)


@pytest.mark.parametrize(("accuracy", "n"), [(-0.1, 10), (1.1, 10), (math.nan, 10), (0.5, 0)])
def test_interval_of_no_accuracy_is_refused(accuracy, n):
    with pytest.raises(ValueError, match="accuracy"):
        interval_95(accuracy, n)
