"""What is public gives the same on arrays that span processes as on those of one process."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes.cluster import run

pytestmark = pytest.mark.full
FILES = ("peft/adapter_model.safetensors", "merged/model.safetensors")


def results(front_end, folder, processes):
    run("tests.processes.public", front_end, folder, processes=processes, devices=4 // processes)
    texts = [(folder / f"texts-{i}").read_text() for i in range(processes)]
    # Which process it was that failed first is not the same.
    texts = [text.replace(str(folder), "FOLDER").replace("process 0: ", "") for text in texts]
    return texts, np.load(folder / "values.npz"), [load_file(folder / file) for file in FILES]


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_everything_public_runs_on_arrays_of_several_processes(front_end, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    (alone,), values, files = results(front_end, folders[0], 1)
    texts, values_of_two, files_of_two = results(front_end, folders[1], 2)
    assert texts[0] == texts[1]
    closed = [line for line in texts[0].splitlines() if line.startswith("closed over: ")]
    assert ["dora_base" in line for line in closed] == [True] * (front_end == "linen")
    assert [line for line in texts[0].splitlines() if line not in closed] == alone.splitlines()
    for one, two in ((values, values_of_two), *zip(files, files_of_two, strict=True)):
        assert set(one) == set(two)
        for name in one:
            np.testing.assert_allclose(two[name], one[name], rtol=2e-6, atol=1e-6, err_msg=name)
    np.testing.assert_equal(*(file[0] for file in (files, files_of_two)))
