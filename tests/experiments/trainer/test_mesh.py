"""A mesh by name."""

import jax
import pytest

from experiments.trainer.mesh import AXES, MeshError, make_mesh, parse_mesh


@pytest.mark.parametrize("text", ["fsdp", "fsdp=", "fsdp=0", "fsdp=-1", "rows=2", "data=1,data=1"])
def test_a_misspelt_mesh_is_refused_by_its_part(text):
    with pytest.raises(MeshError, match="cannot read"):
        parse_mesh(text)


def test_a_mesh_has_all_axes_in_order():
    mesh = make_mesh(parse_mesh("data = 1, tensor=1"))
    assert mesh.axis_names == AXES
    assert mesh.size == 1


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    more = len(jax.devices()) + 1
    with pytest.raises(MeshError, match=f"has {more} devices"):
        make_mesh(parse_mesh(f"fsdp={more}"))
