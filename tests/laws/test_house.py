"""How the library is built: which room imports which, who tells the front ends apart, what is long.

The rooms are the modules and folders of `dora_jax/`. All is read from the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dora_jax"
# Each may import those of the lines before its own, and itself.
ROOMS = """
    interrupts
    errors
    processes
    patterns disk
    validation
    config
    selection
    ops
    decomposition
    layers
    adapters
    linen nnx
    model
    api
    training
    analysis
    checkpoint
    names
    huggingface
    peft
    cli
"""
ORDER = {name: i for i, line in enumerate(ROOMS.split("\n")) for name in line.split()}
ENTRANCES = {"__init__", "__main__", "version"}
# What stands on either front end asks `model`.
TELL_FRONT_ENDS_APART = {"api", "model", "linen", "nnx"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports(path: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_its_place():
    assert {room(path) for path in FILES} - ENTRANCES <= ORDER.keys()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_between_rooms_point_one_way(path):
    own = room(path)
    if own in ENTRANCES:
        return
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("dora_jax.")}
    later = {other for other in rooms - {own, "version"} if ORDER[other] >= ORDER[own]}
    assert not later


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_inner_parts_of_jax_are_used_in_ops_alone(path):
    inner = ("jax.interpreters", "jax.extend", "jax._src")
    assert room(path) == "ops" or not [name for name in imports(path) if name.startswith(inner)]


def classes_asked_for(path: Path) -> Iterator[str]:
    """Yields the classes that a file asks for with `isinstance`, as they are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            for inner in ast.walk(node.args[1]):
                if isinstance(inner, ast.Name | ast.Attribute):
                    yield ast.unparse(inner)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_few_files_tell_the_front_ends_apart(path):
    front_ends = {"linen.Module", "nn.Module", "nnx.Module", "DoRAModel", "dora_linen.DoRAModel"}
    found = front_ends & set(classes_asked_for(path))
    assert room(path) in TELL_FRONT_ENDS_APART or name_of(path) == "layers/registry.py" or not found


# Limits.


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_have_at_most_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_have_at_most_60_lines_and_7_parameters(path):
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, function.name
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named = [a for a in given if a.arg not in ("self", "cls")]
        assert len(named) <= 7, function.name
