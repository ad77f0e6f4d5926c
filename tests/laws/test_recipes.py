"""The recipes of `docs/recipes.md`, run as they stand, against float64 NumPy written here."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dora_jax
from tests.support.quick import quick_jit
from tests.support.reference import differences

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SCALING = 2.0  # alpha 4, rank 2


def programs():
    """Returns the programs of each section, by its first word, in lower case."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        name = re.match(r"\w+", section)[0].lower()
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        found[name] = found.get(name, []) + blocks
    return found


PROGRAMS = programs()


def run(namespace, *blocks):
    own = dict(namespace)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), own)
    return own


@pytest.fixture(scope="module")
def shared():
    return run({}, *PROGRAMS["what"])


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def moved(tree, seed=0):
    """Returns a tree away from where it started."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda v: np.asarray(v) + 0.3 * draw.normal(size=np.shape(v)), tree)


def forward(kernels, params, x):
    """Returns the output of the page's model with these kernels."""
    first, last = params["layers_0"]["bias"], params["layers_2"]["bias"]
    return np.tanh(x @ kernels["layers_0"] + first) @ kernels["layers_2"] + last


def frozen_kernels(params):
    return {name: layer["kernel"] for name, layer in params.items()}


def dora(own, w):
    v = w + SCALING * own["lora_a"] @ own["lora_b"]
    return v * own["magnitude"] / column_norms(v)


def inputs_of(params, x):
    first = params["layers_0"]
    return {"layers_0": x, "layers_2": np.tanh(x @ first["kernel"] + first["bias"])}


def column_norms(v):
    return np.sqrt(np.square(v).sum(0))


def edora(own, w, page, name):
    u, s, vt = np.linalg.svd(w)
    # The sign of a pair of singular vectors is the program's that computes them.
    signs = np.sign((u[:, :2] * np.asarray(page["frozen"][name]["lora_a"], np.float64)).sum(0))
    v = w + SCALING * (u[:, :2] * s[:2] * signs) @ own["core"] @ (signs[:, None] * vt[:2])
    return v * own["magnitude"] / column_norms(v)


def dvora(own, w, page, name):
    a, b = wide((page["shared_a"], page["shared_b"]))
    a, b = a[: w.shape[0]], b[:, : w.shape[1]]
    v = w + SCALING * a @ np.diag(own["d"]) @ b @ np.diag(own["b"])
    return v * own["magnitude"] / column_norms(v)


def doran(own, w, page, name):
    v = w + SCALING * own["lora_a"] @ own["lora_b"]
    return v * own["magnitude"] / (column_norms(v) + np.exp(own["log_t"]))


def map_of_whole(own, w, page, name):
    product = own["lora_a"] @ own["lora_b"]
    return own["p"] * w / np.linalg.norm(w) + own["q"] * product / np.linalg.norm(product)


RECIPES = {"edora": edora, "dvora": dvora, "doran": doran, "map": map_of_whole}


@pytest.mark.rows(2)
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_starts_as_the_base_and_then_agrees_with_numpy(shared, name):
    page = run(shared, *PROGRAMS[name])
    model, params, x, y = (page[key] for key in ("model", "params", "x", "y"))

    @quick_jit
    def of(trained):
        def loss(trained):
            adapters = page["adapters_of"](trained)
            output = model.apply({"params": params, "dora": adapters}, x)
            return jnp.mean((output - y) ** 2), output

        return jax.value_and_grad(loss, has_aux=True)(trained)

    at, base, inputs = moved(page["trained"]), wide(params), wide(x)
    (_, output), _ = of(page["trained"])
    np.testing.assert_allclose(output, forward(frozen_kernels(base), base, inputs), atol=2e-6)

    def expected(trained):
        kernels = {k: RECIPES[name](trained[k], base[k]["kernel"], page, k) for k in trained}
        return forward(kernels, base, inputs)

    (_, output), gradient = of(jax.tree.map(jnp.float32, at))
    np.testing.assert_allclose(output, expected(wide(at)), atol=1e-5)

    leaves, structure = jax.tree.flatten(wide(at))
    for i, (leaf, own) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):

        def loss(value, i=i):
            changed = structure.unflatten([*leaves[:i], value, *leaves[i + 1 :]])
            return float(np.mean((expected(changed) - wide(y)) ** 2))

        np.testing.assert_allclose(own, differences(loss, leaf), atol=2e-5)


def test_starts_with_a_product_of_zero_are_the_base_and_eva_has_the_inputs_directions(shared):
    base = wide(shared["params"])
    inputs = inputs_of(base, wide(shared["x"]))
    apply = quick_jit(shared["model"].apply)
    expected = forward(frozen_kernels(base), base, inputs["layers_0"])
    page = run(shared, *PROGRAMS["statistics"])
    trees = [run(page, block)["adapters"] for block in PROGRAMS["starts"]]
    for adapters in trees:
        output = apply({"params": shared["params"], "dora": adapters}, shared["x"])
        np.testing.assert_allclose(output, expected, atol=2e-6)
    b_random, eva = trees
    for name, layer in eva.items():
        assert np.all(b_random[name]["lora_a"] == 0) and np.all(b_random[name]["lora_b"] != 0)
        right = np.linalg.svd(inputs[name])[2][:2]
        found = wide(layer["lora_a"])
        np.testing.assert_allclose(found @ found.T, right.T @ right, atol=1e-4)


def corda(kernel, inputs, gradient):
    c = inputs.T @ inputs
    c = c + 0.01 * np.trace(c) / len(c) * np.eye(len(c))
    u, s, vt = np.linalg.svd(c @ kernel, full_matrices=False)
    product = np.linalg.inv(c) @ (u[:, :2] * s[:2]) @ vt[:2]
    return [product], lambda a, b: [a @ b]


def lora_ga(kernel, inputs, gradient):
    u, _, vt = np.linalg.svd(gradient)
    # Whatever the signs of the singular vectors, which differ between programs.
    return [0.09 * u[:, :2] @ u[:, :2].T, 0.09 * vt[2:4].T @ vt[2:4]], lambda a, b: [
        a @ a.T,
        b.T @ b,
    ]


@pytest.mark.rows(1)
@pytest.mark.parametrize(("recipe", "blocks"), [(corda, slice(0, 1)), (lora_ga, slice(1, 2))])
def test_a_start_away_from_zero_is_the_base_and_trains_by_its_change(shared, recipe, blocks):
    page = run(shared, *PROGRAMS["statistics"], *PROGRAMS["own"][blocks])
    model, params, x, y, start = (page[key] for key in ("model", "params", "x", "y", "start"))
    base, inputs = wide(params), inputs_of(wide(params), wide(x))
    error = 2 * (forward(frozen_kernels(base), base, inputs["layers_0"]) - wide(y)) / y.size
    back = error @ base["layers_2"]["kernel"].T * (1 - inputs["layers_2"] ** 2)
    gradients = {"layers_2": inputs["layers_2"].T @ error, "layers_0": wide(x).T @ back}
    for name, layer in wide(start).items():
        wanted, found = recipe(base[name]["kernel"], inputs[name], gradients[name])
        for one, other in zip(found(layer["lora_a"], layer["lora_b"]), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)

    @quick_jit
    def of(adapters):
        def loss(adapters):
            output = model.apply({"params": params, "dora": adapters}, x)
            return jnp.mean((output - y) ** 2), output

        return jax.value_and_grad(loss, has_aux=True)(adapters)

    at, first = moved(start), wide(start)

    def expected(adapters):
        kernels = {}
        for name, own in adapters.items():
            was = first[name]["lora_a"] @ first[name]["lora_b"]
            v = base[name]["kernel"] + own["lora_a"] @ own["lora_b"] - was
            kernels[name] = v * own["magnitude"] / column_norms(v)
        return forward(kernels, base, wide(x))

    (_, output), _ = of(start)
    np.testing.assert_allclose(
        output, forward(frozen_kernels(base), base, wide(x)), atol=2e-6, rtol=1e-5
    )
    (_, output), gradient = of(jax.tree.map(jnp.float32, at))
    np.testing.assert_allclose(output, expected(wide(at)), atol=2e-5)

    def loss(value):
        changed = wide(at) | {"layers_0": wide(at)["layers_0"] | {"lora_b": value}}
        return float(np.mean((expected(changed) - wide(y)) ** 2))

    found = gradient["layers_0"]["lora_b"]
    np.testing.assert_allclose(found, differences(loss, wide(at)["layers_0"]["lora_b"]), atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_composes_merges_and_is_an_ordinary_adapter_with_its_own_magnitude(
    shared, name, tmp_path
):
    page = run(shared, *PROGRAMS[name])
    model, params, at = page["model"], page["params"], moved(page["trained"])
    adapters = page["adapters_of"](jax.tree.map(jnp.float32, at))
    merged = frozen_kernels(dora_jax.merge(model, params, adapters))
    for layer, kernel in merged.items():
        expected = RECIPES[name](wide(at[layer]), wide(params[layer]["kernel"]), page, layer)
        np.testing.assert_allclose(kernel, expected, atol=1e-5)
    if name in ("doran", "map"):  # they hold scales: m = c n makes them ordinary
        norms = page["norms"] if name == "doran" else run(shared, *PROGRAMS["doran"])["norms"]
        length = norms(
            {k: {n: own[n] for n in ("lora_a", "lora_b")} for k, own in adapters.items()}
        )
        adapters = {
            k: {"lora_a": own["lora_a"], "lora_b": own["lora_b"], "magnitude": own["scale"] * n}
            for (k, own), n in zip(adapters.items(), length.values(), strict=True)
        }
    dora_jax.save(tmp_path / "adapter", model, adapters)
    loaded = dora_jax.load(tmp_path / "adapter", model)[1]
    again = frozen_kernels(dora_jax.merge(model, params, loaded))
    for layer, kernel in merged.items():
        np.testing.assert_allclose(again[layer], kernel, atol=1e-5)


@pytest.mark.full
def test_a_tree_that_was_computed_works_in_nnx(shared):
    graphdef, state = shared["graphdef"], shared["state"]
    layer = shared["nnx"].merge(graphdef, state)
    at = moved(dora_jax.get_adapters(layer))
    tree = jax.tree.map(jnp.float32, at)
    output = quick_jit(shared["nnx_output"])(tree, shared["x"])
    expected = wide(shared["x"]) @ dora(at, wide(layer.kernel[...])) + wide(layer.bias[...])
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.full
def test_the_magnitudes_of_bidora_are_trained_through_the_step_of_the_factors(shared):
    page = run(shared, *PROGRAMS["bidora"])
    base = wide(page["params"])
    (train, held_out) = (wide(page[key]) for key in ("train", "held_out"))
    factors, magnitudes = moved(page["factors"]), moved(page["magnitudes"], seed=1)
    single = jax.tree.map(jnp.float32, (magnitudes, factors))
    gradient = quick_jit(page["hypergradient"])(*single)

    def loss(factors, magnitudes, half):
        own = {name: factors[name] | {"magnitude": magnitudes[name]} for name in factors}
        kernels = {name: dora(own[name], base[name]["kernel"]) for name in own}
        return float(np.mean((forward(kernels, base, half[0]) - half[1]) ** 2))

    leaves, structure = jax.tree.flatten(factors)

    def upper(magnitudes):
        def moving(i):
            def of(value):
                changed = structure.unflatten([*leaves[:i], value, *leaves[i + 1 :]])
                return loss(changed, magnitudes, train)

            return leaves[i] - page["rate"] * differences(of, leaves[i])

        return loss(structure.unflatten([*map(moving, range(len(leaves)))]), magnitudes, held_out)

    for name, own in gradient.items():
        expected = differences(
            lambda value, name=name: upper(magnitudes | {name: value}), magnitudes[name], 1e-4
        )
        np.testing.assert_allclose(own, expected, atol=1e-4)
        assert np.max(np.abs(expected)) > 0.01


@pytest.mark.full
def test_biases_are_trained_beside_the_adapters(shared):
    page = run(shared, *PROGRAMS["biases"])
    base, inputs, y = wide(page["params"]), wide(page["x"]), wide(page["y"])
    at = moved(page["trained"])
    gradient = quick_jit(jax.grad(page["loss_beside"]))(jax.tree.map(jnp.float32, at))
    kernels = {k: dora(own, base[k]["kernel"]) for k, own in at["adapters"].items()}
    for path in (("layers_0", "bias"), ("layers_2", "bias")):

        def loss(value, path=path):
            own = at["biases"] | {path: value}
            biases = {layer: {"bias": bias} for (layer, _), bias in own.items()}
            return float(np.mean((forward(kernels, biases, inputs) - y) ** 2))

        found = gradient["biases"][path]
        np.testing.assert_allclose(found, differences(loss, at["biases"][path]), atol=1e-5)
    adapted, in_nnx = page["adapted"], page["gradient"]
    error = inputs @ wide(adapted.kernel[...]) + wide(adapted.bias[...]) - y
    np.testing.assert_allclose(in_nnx["bias"][...], 2 * error.sum(0) / y.size, atol=1e-5)
    assert set(in_nnx) == {"bias", "lora_a", "lora_b", "magnitude"}
