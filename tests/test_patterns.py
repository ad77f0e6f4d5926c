"""Patterns match what Python's `re` does, and no pattern takes long."""

from __future__ import annotations

import random
import re
import time

import pytest

from dora_jax import DoRAConfig
from dora_jax.errors import ConfigError
from dora_jax.patterns import Pattern
from dora_jax.selection import select_layers

# As adapters on the Hugging Face Hub have them, and one of each construct.
PATTERNS = [
    r".*\.(q_proj|v_proj)$",
    r"^(?!.*patch_embed).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:k_proj|v_proj|q_proj)))",
    r"^(language_model(?=\.).*\.(up_proj|down_proj|q_proj))$",
    r"(.*\.)*(q_proj|k_proj)",
    r".*layers\.(?:[0-9]|1[0-5])\..*(?:q|k|v|o)_proj",
    r"(?:(?!mlp).)*proj",
    r".*(?<!q)_proj",
    r"model\.layers\.\d+\.[^.]+\.q_proj",
    r"[^.]+\.\d+\.(?:a{2,3}|b?)+",
    r"(?i)MODEL.*_PROJ",
    r"(?s).*",
    r"(?x) .*  q_proj  # the queries",
    r"\Amodel\Z",
    r"a|b|ab*",
    r"(?:ab|a)(?:c|bcd)(?:d*)",
    r"x{0}a",
    r"",
]
PARTS = ["model", "layers", "0", "1", "12", "self_attn", "q_proj", "v_proj", "mlp", "up_proj"]
PARTS += ["language_model", "text", "a", "ab", "abcd", "b", "aab"]


def names(rng, count):
    yield from ("", "\n", "a\n", "model", "model\n", "ab", "abcd", "MODEL.q_proj")
    for _ in range(count):
        yield ".".join(rng.choices(PARTS, k=rng.randint(1, 6)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_published_pattern_matches_what_re_does(pattern):
    ours, theirs = Pattern(pattern, "field"), re.compile(pattern)
    end = None if pattern.startswith(("(?i", "(?s", "(?x")) else rf"(.*\.)?({pattern})$"
    for name in names(random.Random(0), 60):
        assert ours.fullmatch(name) == (theirs.fullmatch(name) is not None), name
        if end and not name.endswith("\n"):
            assert ours.matches_end(name) == (re.match(end, name) is not None), name


def drawn(rng, depth):
    """Returns a random pattern."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\b", "^", "$"])
    inner = drawn(rng, depth - 1)
    if kind < 0.5:
        return inner + drawn(rng, depth - 1)
    if kind < 0.65:
        return f"(?:{inner}|{drawn(rng, depth - 1)})"
    if kind < 0.9:
        return f"(?:{inner})" + rng.choice(["*", "+", "?", "{2}", "{1,2}", "*?", "{0,3}"])
    return rng.choice(["(?=", "(?!"]) + inner + ")"


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_a_drawn_pattern_matches_what_re_does(count):
    rng = random.Random(0)
    for _ in range(count):
        pattern = drawn(rng, 4)
        ours, theirs = Pattern(pattern, "field"), re.compile(pattern)
        for _ in range(8):
            name = "".join(rng.choices("abc.", k=rng.randint(0, 8)))
            assert ours.fullmatch(name) == (theirs.fullmatch(name) is not None), (pattern, name)


ENDLESS = [
    "(([a-z0-9._]+)+)+!",
    "(a*)*" * 50 + "!",
    ".*" * 500 + "!",
    "(" * 40 + "a*" + ")*" * 40 + "!",
    "(?:a{0,60000}){0,60000}!",
    "(?:.{1000}){4000000000}",
    "(?i)" + "[\\0-\U0010ffff]" * 100,
    "(.?){65000}!",
    "((?=(.*))*)*" * 20 + "!",
]
NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_no_pattern_takes_long(pattern):
    start = time.perf_counter()
    assert not Pattern(pattern, "field").fullmatch(NAME)
    assert time.perf_counter() - start < 2


def test_a_name_without_end_is_an_error():
    with pytest.raises(ConfigError, match=r"field: '\.\*!' takes too long to match"):
        Pattern(".*!", "field").fullmatch("a." * 500_000)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a" * 300_000, "more than 200,000 characters"),
        (r"(a)\1", "a back-reference"),
        ("(a)?(?(1)b)", "a condition"),
        ("(?>a)", "an atomic group"),
        ("a*+", "a possessive quantifier"),
        ("x{99999999999}", "not a regular expression"),
        ("[", "not a regular expression"),
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_what_is_not_read_is_named_with_its_field(field, pattern, message):
    with pytest.raises(ConfigError, match=f"^{field}: .*{message}"):
        DoRAConfig(**{field: {pattern: 2} if field == "rank_pattern" else pattern})


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_selection_ends_whatever_its_pattern(field):
    value = {ENDLESS[0]: 2} if field == "rank_pattern" else ENDLESS[0]
    layers = {("layers", str(i), "q_proj"): True for i in range(50)}
    with pytest.raises(ConfigError, match=f"^{field}"):
        select_layers(DoRAConfig(**{field: value}), layers, layers)
