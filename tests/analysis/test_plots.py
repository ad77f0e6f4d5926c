"""The picture of weight changes: its points are the values, its correlations are NumPy's."""

from __future__ import annotations

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from dora_jax.analysis import WeightChange, plot_weight_change, weight_change
from dora_jax.decomposition import KernelAxes
from dora_jax.errors import DoRAError


def change_of(shape, seed, sign=1):
    """A change whose magnitude follows its direction, with noise."""
    rng = np.random.default_rng(seed)
    direction = rng.uniform(0.1, 0.2, shape).astype(np.float32)
    magnitude = (1 + sign * direction + 0.02 * rng.normal(size=shape)).astype(np.float32)
    return WeightChange(jnp.asarray(magnitude), jnp.asarray(magnitude / 7), jnp.asarray(direction))


def drawn(ax):
    """Returns the points of each entry, `(points, 2)`, by the label in the legend."""
    return {c.get_label(): np.asarray(c.get_offsets()) for c in ax.collections}


@pytest.mark.parametrize("relative", [False, True])
def test_every_layer_and_checkpoint_is_a_point_of_its_entry(relative):
    """A sequence of changes, one of several checkpoints, and one alone are drawn alike."""
    stacked = change_of((4, 3), 0)  # (checkpoints, layers)
    changes = {
        "stacked": stacked,
        "listed": [WeightChange(*(field[i] for field in stacked)) for i in range(4)],
        "alone": change_of((), 1),
    }
    axes = Figure().subplots()
    assert plot_weight_change(changes, axes, relative=relative) is axes
    expected = {}
    for name, change in (("stacked", stacked), ("listed", stacked), ("alone", changes["alone"])):
        magnitude = change.relative_magnitude if relative else change.magnitude
        expected[name] = np.stack([np.ravel(change.direction), np.ravel(magnitude)], 1)
    for found, (name, points) in zip(drawn(axes).items(), expected.items(), strict=True):
        assert found[0].split(" (")[0] == name
        np.testing.assert_array_equal(found[1], points)


def test_the_legend_has_the_correlation_of_each_entry_and_of_all_points():
    changes = {"full": change_of(40, 0, sign=-1), "lora": change_of(40, 1), "one": change_of(1, 2)}
    axes = plot_weight_change(changes, Figure().subplots())
    r = {k: np.corrcoef(c.direction, c.magnitude)[0, 1] for k, c in changes.items() if k != "one"}
    assert r["full"] < -0.5 and r["lora"] > 0.5
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"full (r = {r['full']:.2f})", f"lora (r = {r['lora']:.2f})", "one"]
    every = np.concatenate([[c.direction, c.magnitude] for c in changes.values()], axis=1)
    title = axes.get_legend().get_title().get_text()
    assert title == f"all points (r = {np.corrcoef(every)[0, 1]:.2f})"


def test_a_kernel_of_zero_columns_does_not_hide_the_correlation():
    """Its mean over no column is NaN."""
    axes = KernelAxes((0,), (1,), (2,))
    before = np.random.default_rng(0).normal(size=(5, 6, 3)).astype(np.float32)
    before[2] = 0
    after = before * np.linspace(1, 2, 5)[:, None, None] + np.linspace(0, 1, 5)[:, None, None]
    change = weight_change(jnp.asarray(before), jnp.asarray(after), axes)
    assert np.isnan(change.direction[2])
    (label,) = drawn(plot_weight_change({"up": change}, Figure().subplots()))
    rest = np.delete(np.stack([change.direction, change.magnitude]), 2, axis=1)
    assert label == f"up (r = {np.corrcoef(rest)[0, 1]:.2f})"


@pytest.mark.parametrize("number", [10, 32])
def test_no_two_entries_share_a_colour(number):
    changes = {f"layer {i}": change_of(2, i) for i in range(number)}
    axes = plot_weight_change(changes, Figure().subplots())
    assert len({tuple(c.get_facecolor()[0]) for c in axes.collections}) == number


def test_without_axes_a_new_figure_is_made():
    matplotlib.use("agg")
    from matplotlib import pyplot

    one, other = (plot_weight_change({"up": change_of(3, 0)}) for _ in range(2))
    assert one.figure is not other.figure
    pyplot.close(one.figure)
    pyplot.close(other.figure)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(DoRAError, match="at least one entry"):
        plot_weight_change({}, Figure().subplots())
