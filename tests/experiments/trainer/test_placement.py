"""Training on a mesh gives what one device gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.trainer.mesh import make_mesh, parse_mesh
from experiments.trainer.placement import largest_axes, own_rows, place
from experiments.trainer.settings import SettingsError, TrainerSettings
from tests.experiments.trainer.fits import adapted, adapters, run


def trained(folder, mesh, microbatches):
    """The adapters that another process, of four virtual devices, comes to."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    module = "tests.experiments.trainer.fits"
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), mesh, str(microbatches)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "microbatches"), [("data=2,fsdp=2", 2), ("fsdp=4", 1), ("fsdp=2,tensor=2", 1)]
)
def test_a_mesh_trains_to_what_one_device_trains_to(mesh, microbatches, tmp_path):
    model, _ = run(tmp_path / "one", TrainerSettings(microbatches=microbatches))
    found = trained(tmp_path / "mesh", mesh, microbatches)
    expected = adapters(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_metadata_decides_where_an_array_lies_and_else_its_largest_axes():
    mesh = make_mesh(parse_mesh(""))
    model, optimizer = adapted()
    kernel = model.hidden.kernel
    kernel.set_metadata(out_sharding=("tensor", None))
    place(model, optimizer, mesh)
    assert kernel[...].sharding.spec == P("tensor", None)
    lora_a = model.hidden.lora_a[...]
    assert lora_a.sharding.spec == P("tensor", None)
    moments = [x.sharding for x in jax.tree.leaves(nnx.state(optimizer))]
    assert moments.count(lora_a.sharding) == 2
    assert model.embed.embedding[...].sharding.spec == P(None, None)  # a mesh of one device
    for node in model, optimizer:
        assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(nnx.state(node)))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 8), P("tensor", "fsdp")),
        ((6, 3), P("tensor", None)),
        ((3, 12, 16), P(None, "tensor", "fsdp")),
        ((5, 7), P(None, None)),
        ((8,), P(None)),
    ],
)
def test_a_matrix_is_cut_along_the_largest_axes_that_the_devices_divide(shape, expected):
    assert largest_axes(shape, {"data": 1, "fsdp": 4, "tensor": 2}) == expected


def test_a_process_reads_the_rows_of_its_devices():
    assert own_rows(None, 5) == slice(0, 5)
    mesh = make_mesh(parse_mesh(""))
    assert own_rows(mesh, 5) == slice(0, 5)
    with pytest.raises(SettingsError, match="5 rows cannot be cut for 4 devices"):
        own_rows(jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor")), 5)
