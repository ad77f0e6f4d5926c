"""What is accepted, what is selected, and what the errors say."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dora_jax import DoRAConfig
from dora_jax.errors import ConfigError, LayoutError
from dora_jax.selection import select_layers
from tests.support.properties import for_all

# A small transformer: True where "all-linear" covers the layer.
LAYERS = {
    ("embed",): False,
    ("block_0", "attention", "query"): True,
    ("block_0", "attention", "value"): True,
    ("block_0", "mlp", "up"): True,
    ("block_1", "attention", "query"): True,
    ("block_1", "attention", "value"): True,
    ("block_1", "mlp", "up"): True,
    ("head",): True,
}
MODULES = [
    (),
    *LAYERS,
    ("block_0",),
    ("block_0", "attention"),
    ("block_0", "mlp"),
    ("block_0", "norm"),
    ("block_1",),
    ("block_1", "attention"),
    ("block_1", "mlp"),
    ("block_1", "norm"),
]


def selected(**fields) -> set[str]:
    return {".".join(path) for path in select_layers(DoRAConfig(**fields), LAYERS, MODULES)}


QUERIES = {"block_0.attention.query", "block_1.attention.query"}
VALUES = {"block_0.attention.value", "block_1.attention.value"}
UPS = {"block_0.mlp.up", "block_1.mlp.up"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, r"^rank must be an integer of at least 0, got -1"),
        ({"rank": 2.0}, r"^rank must be an integer"),
        ({"rank": True}, r"^rank must be an integer"),
        ({"alpha": 0.0}, r"^alpha must be a finite number above 0, got 0.0"),
        ({"alpha": -1.0}, r"^alpha must"),
        ({"alpha": math.nan}, r"^alpha must"),
        ({"alpha": math.inf}, r"^alpha must"),
        ({"alpha": "16"}, r"^alpha must.*'16'"),
        ({"eps": 0.0}, r"^eps must be a finite number above 0"),
        ({"dropout": 1.0}, r"^dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"^dropout must"),
        ({"dropout": math.nan}, r"^dropout must"),
        ({"norm_gradient": "none"}, r"^norm_gradient must be one of .*'exact'.* got 'none'"),
        ({"init": "zeros"}, r"^init must be one of .*'kaiming_uniform'.* got 'zeros'"),
        ({"use_rslora": 1}, r"^use_rslora must be True or False, got 1"),
        ({"decompose": "yes"}, r"^decompose must be True or False"),
        ({"normalize": None}, r"^normalize must be True or False"),
        ({"magnitude_trainable": 0}, r"^magnitude_trainable must be True or False"),
        ({"adapter_dtype": "int8"}, r"^adapter_dtype must be a floating dtype, got int8"),
        ({"adapter_dtype": "float31"}, r"^adapter_dtype is not a dtype: 'float31'"),
        ({"target_modules": []}, r"^target_modules is empty"),
        ({"target_modules": "("}, r"^target_modules: '\(' is not a regular expression"),
        ({"target_modules": [""]}, r"^target_modules must hold non-empty strings, got ''"),
        ({"exclude_modules": [3]}, r"^exclude_modules must hold non-empty strings, got 3"),
        ({"modules_to_save": "head"}, r"^modules_to_save must be a list of names: \['head'\]"),
        ({"layers_to_transform": [0.5]}, r"^layers_to_transform must hold integers, got \[0.5\]"),
        ({"layers_to_transform": [0], "layers_pattern": [3]}, r"^layers_pattern must be a name"),
        ({"layers_to_transform": [0], "layers_pattern": []}, r"^layers_pattern must be a name"),
        ({"layers_to_transform": [True]}, r"^layers_to_transform must hold integers"),
        ({"layers_pattern": "layers"}, r"^layers_pattern needs layers_to_transform"),
        ({"rank_pattern": {"query": -2}}, r"^rank_pattern\['query'\] must be an integer"),
        ({"rank_pattern": {"(": 2}}, r"^rank_pattern: '\(' is not a regular expression"),
        ({"alpha_pattern": {"query": 0}}, r"^alpha_pattern\['query'\] must be a finite number"),
        ({"alpha_pattern": {"[": 1.0}}, r"^alpha_pattern: '\[' is not a regular expression"),
        ({"rank": 0, "decompose": False}, r"^rank 0 trains the magnitude alone"),
        ({"rank": 0, "magnitude_trainable": False}, r"^rank 0 trains the magnitude alone"),
        ({"rank_pattern": {"query": 0}, "decompose": False}, r"^rank 0 trains the magnitude"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        DoRAConfig(**fields)


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DoRAConfig().rank = 4  # type: ignore[misc]


EVERY_FIELD = DoRAConfig(
    rank=4,
    alpha=3.5,
    dropout=0.25,
    target_modules=["query", "mlp/up"],
    exclude_modules=r"block_1\..*",
    rank_pattern={"query": 2, r"block_\d+\.mlp.*": 0},
    alpha_pattern={"query": 1.0},
    modules_to_save=["head"],
    layers_to_transform=[0, 2],
    layers_pattern=["layers", "decoder.h"],
    use_rslora=True,
    normalize=False,
    norm_gradient="detached",
    init="gaussian",
    eps=1e-6,
    adapter_dtype="bfloat16",
)


@pytest.mark.parametrize(
    "config",
    [DoRAConfig(), EVERY_FIELD, DoRAConfig(decompose=False), DoRAConfig(magnitude_trainable=False)],
)
def test_json_and_pickle_give_back_an_equal_configuration(config):
    for copy in (DoRAConfig.from_json(config.to_json()), pickle.loads(pickle.dumps(config))):
        assert copy == config
        assert hash(copy) == hash(config)
    assert json.loads(config.to_json()) == config.to_dict()
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(DoRAConfig)}


@for_all(
    rank=st.integers(1, 512),
    alpha=st.floats(1e-6, 1e6),
    dropout=st.floats(0, 1, exclude_max=True),
    names=st.lists(st.from_regex(r"[a-z_]\w{0,9}(\.\w{1,9})?", fullmatch=True), min_size=1),
    rslora=st.booleans(),
)
def test_every_valid_configuration_round_trips(rank, alpha, dropout, names, rslora):
    config = DoRAConfig(rank, alpha, dropout, names, use_rslora=rslora)
    assert DoRAConfig.from_json(config.to_json()) == config
    scaling = config.layer_settings(("any",)).scaling
    assert scaling == alpha / (math.sqrt(rank) if rslora else rank)


def as_numpy(value):
    """Returns a field's value as it comes out of a computation."""
    if isinstance(value, dict):
        return {np.str_(k): as_numpy(v) for k, v in value.items()}
    return np.asarray(value)[()]  # a scalar, or an array


def test_fields_may_be_of_numpy_and_jax():
    fields = EVERY_FIELD.to_dict()
    other = {k: as_numpy(v) for k, v in fields.items()}
    arrays = {
        "rank": jnp.array(4),
        "alpha": jnp.float32(3.5),
        "layers_to_transform": jnp.array([0, 2]),
        "use_rslora": np.array(True),
        "target_modules": [np.str_(name) for name in fields["target_modules"]],
    }
    for given in (other, {**fields, **arrays}):
        config = DoRAConfig(**given)
        assert config == EVERY_FIELD
        assert DoRAConfig.from_json(config.to_json()) == EVERY_FIELD
        assert {type(v) for v in config.to_dict().values()} <= {int, float, bool, str, list, dict}


def test_a_traced_field_is_named():
    with pytest.raises(ConfigError, match="alpha is traced: make the configuration outside of"):
        jax.eval_shape(lambda x: jnp.zeros(DoRAConfig(alpha=x).rank), 2.0)


def test_words_of_peft_are_answered_with_ours():
    def of_json(**fields):
        return DoRAConfig.from_json(json.dumps(fields))

    for make in (DoRAConfig, functools.partial(dataclasses.replace, DoRAConfig()), of_json):
        for fields, answer in (
            ({"r": 8}, "Write rank for r"),
            ({"lora_alpha": 8, "lora_dropout": 0.1}, "alpha for lora_alpha; dropout for lora_drop"),
            ({"rank": 4, "task_type": "CAUSAL_LM"}, "nothing for task_type"),
            ({"use_dora": True}, "decompose for use_dora"),
        ):
            with pytest.raises(ConfigError, match=answer):
                make(**fields)
    assert list(inspect.signature(DoRAConfig).parameters)[:2] == ["rank", "alpha"]


def test_numbered_layers_are_counted_from_the_end_of_each_list():
    """Also where the last layers hold no target."""
    layers = {("enc", "layers", str(i), "up"): True for i in range(4)} | {
        ("dec", f"layers_{i}", "up"): True for i in range(2)
    }
    modules = [*layers, ("enc", "layers", "4"), ("enc", "layers", "5")]

    def chosen(**fields):
        config = DoRAConfig(**fields)
        return {".".join(path) for path in select_layers(config, layers, modules)}

    assert chosen(layers_to_transform=[-1, -3]) == {"enc.layers.3.up", "dec.layers_1.up"}
    enc, dec = {f"enc.layers.{i}.up" for i in range(4)}, {f"dec.layers_{i}.up" for i in range(2)}
    for pattern, others in (("enc.layers", dec), (["dec/layers", "h"], enc)):
        own = chosen(
            layers_to_transform=[0], layers_pattern=pattern, exclude_modules=sorted(others)
        )
        assert own == {sorted((enc | dec) - others)[0]}


def test_every_field_tells_configurations_apart():
    default = DoRAConfig(layers_to_transform=[1])
    others = {name: getattr(EVERY_FIELD, name) for name in EVERY_FIELD.to_dict()}
    others |= {"decompose": False, "magnitude_trainable": False}
    for name, value in others.items():
        other = dataclasses.replace(default, **{name: value})
        assert other != default, name
        assert hash(other) != hash(default), name


def test_the_form_in_which_a_field_is_given_does_not_matter():
    one = DoRAConfig(
        alpha=4,
        target_modules=["a", "b/c"],
        alpha_pattern={"a": 1},
        adapter_dtype=np.float32,  # type: ignore[arg-type]
    )
    two = DoRAConfig(alpha=4.0, target_modules=("a", "b.c"), alpha_pattern={"a": 1.0})
    assert one == two
    assert hash(one) == hash(two)


def test_of_the_patterns_that_match_the_first_counts_also_after_a_round_trip():
    wide, narrow = ("query", 4), (r"block_1\.attention\.query", 2)
    path = ("block_1", "attention", "query")
    for patterns, rank in (((wide, narrow), 4), ((narrow, wide), 2)):
        config = DoRAConfig(rank_pattern=dict(patterns))
        assert config.layer_settings(path).rank == rank
        assert DoRAConfig.from_json(config.to_json()).layer_settings(path).rank == rank
    reordered = DoRAConfig(rank_pattern=dict((wide, narrow)))
    assert reordered != DoRAConfig(rank_pattern=dict((narrow, wide)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "JSON object, got list"),
        ('{"rank": 4, "ranks": 2}', r"unknown fields \['ranks'\].*'rank'"),
        ('{"rank": -4}', "rank must"),
    ],
)
def test_a_bad_json_configuration_says_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        DoRAConfig.from_json(text)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["query"]}, QUERIES),
        ({"target_modules": ["query", "value"]}, QUERIES | VALUES),
        ({"target_modules": ["attention.query"]}, QUERIES),
        ({"target_modules": ["block_1.attention.query"]}, {"block_1.attention.query"}),
        ({"target_modules": ["block_1/attention/query"]}, {"block_1.attention.query"}),
        ({"target_modules": ["embed"]}, {"embed"}),
        ({"target_modules": r".*\.(query|value)"}, QUERIES | VALUES),
        (
            {"target_modules": r"block_0\..*"},
            {"block_0.attention.query", "block_0.attention.value", "block_0.mlp.up"},
        ),
        ({"target_modules": "head"}, {"head"}),
        ({"target_modules": "all-linear"}, QUERIES | VALUES | UPS | {"head"}),
        ({"exclude_modules": ["head"]}, QUERIES | VALUES | UPS),
        ({"exclude_modules": ["attention"]}, UPS | {"head"}),
        ({"exclude_modules": r"block_\d"}, {"head"}),
        (
            {"target_modules": ["query", "up"], "exclude_modules": ["block_0"]},
            {"block_1.attention.query", "block_1.mlp.up"},
        ),
        ({"modules_to_save": ["head"]}, QUERIES | VALUES | UPS),
        (
            {"modules_to_save": ["block_1"], "target_modules": ["query"]},
            {"block_0.attention.query"},
        ),
        ({"modules_to_save": ["norm"], "target_modules": []}, set()),
        ({"target_modules": ["query"], "layers_to_transform": [1]}, {"block_1.attention.query"}),
        ({"target_modules": ["query"], "layers_to_transform": [0, 1]}, QUERIES),
        (
            {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "block"},
            {"block_0.mlp.up"},
        ),
        ({"target_modules": ["all-linear", "embed"]}, QUERIES | VALUES | UPS | {"head", "embed"}),
        (
            {"target_modules": ["query"], "layers_to_transform": [-1]},
            {"block_1.attention.query"},
        ),
        ({"target_modules": ["up"], "layers_to_transform": [-2, 1]}, UPS),
        (
            {
                "target_modules": ["up"],
                "layers_to_transform": [-2],
                "layers_pattern": ["h", "block"],
            },
            {"block_0.mlp.up"},
        ),
    ],
)
def test_layers_are_selected(fields, expected):
    assert selected(**fields) == expected


def test_layers_come_in_the_models_order():
    config = DoRAConfig(target_modules=["value", "query"])
    assert list(select_layers(config, LAYERS, MODULES)) == [
        path for path in LAYERS if path[-1] in ("query", "value")
    ]


@pytest.mark.parametrize("whole", ["uery", "block_0.attention", "tention.query", "Query"])
def test_a_name_matches_whole_path_parts_of_a_layer_only(whole):
    with pytest.raises((ConfigError, LayoutError)):
        selected(target_modules=[whole])


def test_patterns_set_rank_and_alpha_by_layer():
    config = DoRAConfig(
        rank=8,
        alpha=16.0,
        target_modules=["query", "value", "up"],
        rank_pattern={r"block_1\.attention\.query": 2, "query": 4, r"mlp\..*": 0},
        alpha_pattern={"value": 32.0},
    )
    specs = {".".join(p): s for p, s in select_layers(config, LAYERS, MODULES).items()}
    found = {name: (spec.rank, spec.alpha, spec.scaling) for name, spec in specs.items()}
    assert found == {
        "block_0.attention.query": (4, 16.0, 4.0),
        "block_1.attention.query": (2, 16.0, 8.0),
        "block_0.attention.value": (8, 32.0, 4.0),
        "block_1.attention.value": (8, 32.0, 4.0),
        "block_0.mlp.up": (0, 16.0, 0.0),
        "block_1.mlp.up": (0, 16.0, 0.0),
    }
    assert specs["block_0.mlp.up"].parameter_names == ("magnitude",)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_whose_layers_all_have_a_value_from_an_earlier_key_is_named(field):
    message = rf"{field} key '.*block_1.*' has no effect: '.*query' comes before it.*Put .* first"
    for wide in ("query", r".*\.query"):
        with pytest.raises(ConfigError, match=message):
            selected(target_modules=["query"], **{field: {wide: 4, r"block_1\..*": 2}})
    # It has an effect on another layer, or asks for what the layers have.
    selected(target_modules=["query", "value"], **{field: {"query": 4, r"block_1\..*": 2}})
    selected(target_modules=["query"], **{field: {"query": 4, r"block_1\..*": 4}})


@pytest.mark.parametrize("pattern", ["uery", "attention", "block_1"])
def test_a_pattern_matches_from_a_dot_to_the_end(pattern):
    with pytest.raises(ConfigError, match=f"rank_pattern key '{pattern}' matches no adapted layer"):
        selected(target_modules=["query"], rank_pattern={pattern: 2})


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({}, ("lora_a", "lora_b", "magnitude")),
        ({"rank": 0}, ("magnitude",)),
        ({"decompose": False}, ("lora_a", "lora_b")),
        ({"magnitude_trainable": False}, ("lora_a", "lora_b")),
        ({"normalize": False}, ("lora_a", "lora_b", "magnitude")),
    ],
)
def test_switches_say_which_arrays_are_trained(switches, names):
    spec = DoRAConfig(**switches).layer_settings(("query",))
    assert spec.parameter_names == names
    assert spec.has_magnitude == ("magnitude" in names)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_modules": ["qeury"]},
            ConfigError,
            r"target_modules entry 'qeury' matches nothing. Nearest names: \['block_\d.*query'",
        ),
        (
            {"target_modules": ["query", "attention.qvalue"]},
            ConfigError,
            r"'attention.qvalue' matches nothing. Nearest names: \['block_\d.attention.value'",
        ),
        (
            {"target_modules": r".*\.qeury"},
            ConfigError,
            r"target_modules='.*qeury' fully matches no layer's dotted path.*block_0.attention.q",
        ),
        ({"target_modules": ["norm"]}, LayoutError, "target_modules names 'norm'.*layout is known"),
        ({"exclude_modules": ["qeury"]}, ConfigError, "exclude_modules entry 'qeury' matches noth"),
        ({"exclude_modules": "x.*"}, ConfigError, "exclude_modules='x.*' fully matches no layer"),
        ({"modules_to_save": ["haed"]}, ConfigError, r"modules_to_save entry 'haed'.*\['head'"),
        (
            {"target_modules": ["query"], "layers_to_transform": [1, 7]},
            ConfigError,
            r"layers_to_transform asks for \[7\], but the layers selected have .* \[0, 1\]",
        ),
        (
            {"target_modules": ["query"], "layers_to_transform": [-3, -1]},
            ConfigError,
            r"layers_to_transform asks for \[-3\], but the layers selected have .* \[0, 1\]",
        ),
        ({"exclude_modules": ".*"}, ConfigError, "no layer matched target_modules='all-linear'"),
        ({"alpha_pattern": {"key": 2.0}}, ConfigError, "alpha_pattern key 'key' matches no adapt"),
        (
            {"target_modules": ["up"], "rank_pattern": {"query": 2}},
            ConfigError,
            "rank_pattern key 'query' matches no adapted layer. .*block_0.mlp.up, block_1.mlp.up",
        ),
    ],
)
def test_a_selection_that_fails_names_the_fix(fields, error, message):
    with pytest.raises(error, match=message):
        selected(**fields)
