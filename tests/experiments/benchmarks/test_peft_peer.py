"""The same work in PEFT."""

import dataclasses

import pytest

from experiments import efficiency
from experiments.benchmarks import device_runs, peft_peer
from experiments.benchmarks.cases import bert, llama
from tests.experiments.tiny_models import BERT, LLAMA, tiny_mlp

NO_DROPOUT = dataclasses.replace(BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TINY_CASES = {
    "mlp": tiny_mlp,
    "bert": lambda: bert(texts=2, length=8, rank=2, shape=NO_DROPOUT),
    "llama": lambda: llama(shape=LLAMA, texts=2, length=8, rank=2),
}


def test_a_missing_peer_names_the_extra(monkeypatch):
    monkeypatch.setattr(peft_peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="parity"):
        efficiency.run(efficiency.Config(parts=("train",), peer="peft"))


@pytest.mark.parity
@pytest.mark.parametrize("case", TINY_CASES)
def test_the_peer_trains_as_many_numbers(case):
    pytest.importorskip("peft")
    case = TINY_CASES[case]()
    steps = peft_peer.training_steps(case)
    rows = device_runs.measure_training(case, ["lora", "dora"], rounds=2, peers=steps)
    for method in ("lora", "dora"):
        ours, theirs = rows[method], rows[f"peft-{method}"]
        assert ours["trainable_parameters"] == theirs["trainable_parameters"]
        assert set(ours["over_peer"]) == {f"peft-{method}"}
