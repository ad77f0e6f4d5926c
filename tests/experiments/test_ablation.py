"""The ablation on a tiny budget: settings of studies, one table, and what is refused."""

import json

import pytest
from flax import nnx

import dora_jax as dora
from experiments import ablation
from experiments.models.bert import BertEncoder
from experiments.models.bert_classifier import BertClassifier
from experiments.sweeps.members import Member
from experiments.sweeps.studies import STUDIES
from experiments.trainer.settings import TrainerSettings
from tests.experiments.sweeps.tiny_sweep import tiny_sweep_task
from tests.experiments.tiny_models import BERT

TASK = tiny_sweep_task()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ablation.Config(
        studies=("own",),
        sweep=("rank=1,2", "learning_rate=1e-2..3e-2:2"),
        choosing_seeds=1,
        seeds=2,
        epochs=0.5,
        batch_size=4,
        members=2,
        run_folder=tmp_path_factory.mktemp("runs"),
    )


@pytest.fixture(scope="module")
def printed(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "load_task", lambda **_: TASK.task)
        yield ablation.run(config)


def test_each_setting_is_trained_at_each_rate_and_with_all_seeds_at_the_best(config, printed):
    runs = [json.loads(f.read_text()) for f in config.run_folder.glob("ablation/*/*/config.json")]
    for rank in (1, 2):
        own = [(run["learning_rate"], run["seed"]) for run in runs if run["rank"] == rank]
        assert sorted(seed for _, seed in own) == [0, 0, 1]
        tested = config.run_folder.glob(f"ablation/*/dora_r{rank}_*/test.json")
        scores = [json.loads(file.read_text())["accuracy"] for file in tested]
        assert f"| DoRA, rank {rank} | {100 * sum(scores) / 2:.2f} ± " in printed


def test_the_settings_of_a_study_differ_in_what_it_varies_alone():
    names = dict.fromkeys(STUDIES)
    found = {name: ablation.Config().settings_of(name) for name in names}
    assert [(m.method, m.rank) for m in found["half-ranks"]] == [
        *(("lora", rank) for rank in (8, 16, 32)),
        *(("dora", rank) for rank in (4, 8, 16)),
    ]
    assert len(found["ranks"]) == 14 and len(found["magnitude"]) == 8
    assert {member.alpha / member.rank for member in found["ranks"]} == {2.0}
    assert {m.batch_size for name, own in found.items() if name != "batch" for m in own} == {32}
    for study in STUDIES.values():
        assert set(study.published) <= {(m.method, m.rank) for own in found.values() for m in own}


@pytest.mark.parametrize(
    ("index", "modules"),
    [
        (0, {"query", "key", "value", "output"}),
        (2, {"intermediate", "output"}),
        (4, {"query", "key", "value", "intermediate", "output"}),
    ],
)
def test_the_study_of_layers_adapts_what_it_says(index, modules):
    member = ablation.Config().settings_of("layers")[index]
    config = member.config(TASK)

    def adapted():
        model = BertClassifier(BertEncoder(BERT, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(0))
        return dora.apply_dora(model, config, rngs=nnx.Rngs(0))

    found = nnx.to_flat_state(nnx.state(nnx.eval_shape(adapted), dora.DoRAParam))
    paths = {path[:-1] for path, _ in found if path[-1] == "lora_a"}
    assert {path[-1] for path in paths} == modules
    assert any("attention" in path for path in paths) == (index != 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"studies": ("parts",)}, "unknown studies"),
        ({"task": "sst2"}, "needs --data"),
        ({"task": "squad"}, "unknown task"),
        ({"sweep": ("rank=1,2",)}, "need each other"),
        ({"studies": ("own",)}, "need each other"),
        ({"sweep": ("rate=1,2",)}, "no field 'rate'"),
        ({"trainer": TrainerSettings(mesh="data=2")}, "spread over all devices"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, says):
    with pytest.raises(SystemExit, match=says):
        ablation.Config(**options)


def test_a_member_is_a_setting_of_the_usual_one():
    config = ablation.Config(rank=4, scaling=1.0, batch_size=16)
    assert config.usual == Member(rank=4, alpha=4.0, batch_size=16)
