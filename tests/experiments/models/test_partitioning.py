"""Names of axes are resolved on a mesh, and do nothing without one."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from experiments.models.llama import Llama
from experiments.models.partitioning import FLAX_RULES, RULES, platform_of, resolve
from experiments.trainer.mesh import make_mesh, parse_mesh
from tests.experiments.tiny_models import LLAMA

TOKENS = np.array([[5, 9, 30, 1], [5, 22, 6, 8]])


def abstract(**options):
    return nnx.eval_shape(lambda: Llama(LLAMA, rngs=nnx.Rngs(0), **options))


def text_of(model):
    graphdef, state = nnx.split(model)
    return str(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(TOKENS))(state))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["numbered", "scanned"])
def test_the_kernels_of_a_decoder_are_cut_by_their_names(scan_layers):
    model = abstract(scan_layers=scan_layers)
    layer = model.layers if scan_layers else model.layers[1]
    stack = (None,) if scan_layers else ()
    for parameter, spec in [
        (layer.self_attn.q_proj.kernel, (*stack, "fsdp", "tensor")),
        (layer.self_attn.k_proj.kernel, (*stack, "fsdp", "tensor")),
        (layer.self_attn.o_proj.kernel, (*stack, "tensor", "fsdp")),
        (layer.mlp.up_proj.kernel, (*stack, "fsdp", "tensor")),
        (layer.mlp.down_proj.kernel, (*stack, "tensor", "fsdp")),
        (model.lm_head.kernel, ("fsdp", "tensor")),
        (model.embed_tokens.embedding, ("tensor", "fsdp")),
    ]:
        assert nnx.get_partition_spec(parameter).get_value() == PartitionSpec(*spec)


def test_without_a_mesh_a_program_has_no_sharding_and_with_one_it_has():
    assert "sharding_constraint" not in text_of(abstract(scan_layers=True))
    with jax.set_mesh(make_mesh(parse_mesh(""))):
        found = text_of(abstract(scan_layers=True))
    assert found.count("sharding_constraint[") >= 8


def test_an_axis_stays_whole_where_the_mesh_cannot_cut_it():
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    cases = {
        (("batch", "length", "heads"), (8, 5, 6)): (("data", "fsdp"), None, "tensor"),
        (("batch", None), (4, 6)): (None, None),  # 4 rows for 8 devices
        (("residual_length", "hidden"), (7, 6)): (None, None),
    }
    for (axes, shape), spec in cases.items():
        assert resolve(axes, mesh, shape) == PartitionSpec(*spec)
    other = AbstractMesh((2,), ("model",))
    assert resolve(("batch", "heads"), other, (8, 8)) == PartitionSpec(None, None)
    manual = AbstractMesh((2, 2), ("fsdp", "tensor"), (AxisType.Manual, AxisType.Auto))
    assert resolve(("batch", "heads"), manual, (8, 8)) == PartitionSpec(None, "tensor")


def test_flax_reads_the_same_rules():
    assert {
        name: (axes,) if isinstance(axes, str) else axes or () for name, axes in FLAX_RULES
    } == (dict(RULES))


def test_the_platform_is_that_of_the_mesh():
    class Kind:
        def __init__(self, device_kind):
            self.device_kind = device_kind

    def mesh_of(device):
        return AbstractMesh((1,), ("data",), abstract_device=device)

    assert platform_of(make_mesh(parse_mesh(""))) == jax.default_backend()
    kinds = {"TPU v5 lite": "tpu", "cpu": "cpu", "NVIDIA H100 80GB HBM3": "gpu"}
    for kind, platform in kinds.items():
        assert platform_of(mesh_of(Kind(kind))) == platform
