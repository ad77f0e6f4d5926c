"""Heads that read an embedding table instead of calling the layer."""

from __future__ import annotations

import pytest
from flax import nnx

import dora_jax as dora
from tests.foreign import hugging_face, libraries
from tests.foreign.harness import LinenCase, run

pytestmark = pytest.mark.foreign


def adapting(case: LinenCase, *names: str) -> LinenCase:
    config = dora.DoRAConfig(rank=2, target_modules=list(names))
    return LinenCase(case.module, case.inputs, config, output=case.output)


@pytest.mark.parametrize(
    ("build", "table"), [(hugging_face.gpt2, "wte"), (hugging_face.t5, "shared")]
)
def test_adapter_that_a_tied_head_would_not_see_is_refused(build, table):
    with pytest.raises(dora.errors.LayoutError, match=f"{table} cannot be adapted: a tied head"):
        run(adapting(build(), table))


def test_tied_head_has_no_kernel_of_its_own():
    with pytest.raises(dora.errors.ConfigError, match="'lm_head' matches nothing"):
        run(adapting(hugging_face.gpt2(), "lm_head"))


def test_table_that_no_head_reads_is_adapted():
    report = run(adapting(hugging_face.gpt2(), "wpe"))
    assert report.start == 0
    assert report.merged <= 1e-5


def test_layer_whose_kernel_is_read_without_a_call_is_refused():
    """Mamba2's convolution multiplies with the kernel of an `nnx.Conv` that it never calls."""
    config = dora.DoRAConfig(rank=0, target_modules=["conv1d.conv", "out_proj"])
    case = libraries.mamba2(config)
    refusal = r"mixer\.conv1d\.conv cannot be adapted: the model computes with its kernel outside"
    with pytest.raises(dora.errors.LayoutError, match=refusal):
        dora.apply_dora(case.model, case.config, rngs=nnx.Rngs(1), inputs=case.inputs)
