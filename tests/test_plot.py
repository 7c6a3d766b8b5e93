import builtins
import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp import plot


def test_the_picture_is_an_image_of_both_panels(tmp_path):
    before = {"kernel": jax.random.normal(jax.random.key(0), (40, 30))}
    after = jc.share_tree(jc.prune_tree(before, 1.5), clusters=8)
    points = [("dense", 4800, 0.9), ("pruned", 900, 0.88), ("file", 300, 0.89)]
    plot.save_picture(tmp_path / "p.png", before, after, points)
    image = (tmp_path / "p.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(image[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1320, 504)
    plot.save_picture(tmp_path / "p.svg", before, after, points)
    drawing = (tmp_path / "p.svg").read_text()
    live = int((jc.densify(after)["kernel"] != 0).sum())
    assert f"after: {live:,} not zero" in drawing
    for name, size, score in points:
        assert f"{name}: {score:.2%}, {size / 1000:,.1f} kB" in drawing


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    groups = jc.program.coupling.Groups((), (), (), ())
    calls = {
        "save_picture": (tmp_path / "p.png", {}, {}, []),
        "plot_groups": (groups, {}),
        "plot_widths": (groups, {}),
    }
    for name, args in calls.items():
        message = rf"{name} needs matplotlib: pip install 'jaxcomp\[plot\]'"
        with pytest.raises(ImportError, match=message):
            getattr(plot, name)(*args)


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]


MLP = {"up": np.ones((3, 4)), "bias": np.ones(4), "down": np.ones((4, 2))}


def test_groups_are_boxes_with_reasons_and_a_legend_of_families():
    from matplotlib.text import Text

    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    figure = plot.plot_groups(groups, MLP)
    figure.draw_without_rendering()  # which puts the names of the rows there
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {"up", "bias", "down", "3", "4", "2"} <= texts
    assert {"axis 0: input", "axis 1: output"} <= texts
    assert {"units of up: 4 groups", "stays"} <= texts


def test_widths_say_what_is_kept_and_what_it_costs():
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    keep = {"units of up": np.array([True, False, True, False])}
    (axes,) = plot.plot_widths(groups, keep).axes
    assert [text.get_text() for text in axes.texts] == ["2 of 4"]
    assert axes.get_title(loc="left").splitlines() == [
        "parameters: 12 of 24 (50.0%)",
        "multiply-adds: 50 of 100 (50.0%)",
    ]


def test_a_picture_of_an_unknown_family_is_an_error():
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    with pytest.raises(ValueError, match="plot_widths needs names of families"):
        plot.plot_widths(groups, {"units": np.ones(4, bool)})


def test_a_mask_of_another_length_is_an_error():
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    with pytest.raises(ValueError, match=r"plot_widths needs bool\[4\] .* bool\[3\]"):
        plot.plot_widths(groups, {"units of up": np.ones(3, bool)})


def test_groups_of_other_params_are_an_error():
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    with pytest.raises(ValueError, match="plot_groups needs the leaf 'up' of family"):
        plot.plot_groups(groups, {"other": np.ones((3, 4))})
    with pytest.raises(ValueError, match="plot_groups needs index 3 of axis 1 of leaf"):
        plot.plot_groups(groups, MLP | {"up": np.ones((3, 3))})


def boxes(figure):
    """(row, colour) -> [(from, to)] of all boxes, the grey ones below too."""
    found = {}
    for part in figure.axes[0].collections:
        colour = tuple(part.get_facecolor()[0])
        for path in part.get_paths():
            extent = path.get_extents()
            spans = found.setdefault((round(extent.y0 + 0.42), colour), [])
            spans.append((extent.x0, extent.x1))
    return found


def concatenated(params, x):
    parts = [jax.nn.relu(x @ params[name]) for name in ("a", "b")]
    return jnp.concatenate(parts, -1) @ params["down"] + params["shift"]


def test_boxes_are_where_the_slices_of_a_family_are():
    from matplotlib.colors import to_rgba

    params = {"a": np.ones((3, 2)), "b": np.ones((3, 3)), "down": np.ones((5, 2))}
    params["shift"] = np.float32(0)
    with jax.numpy_rank_promotion("allow"):
        groups = jc.coupled_groups(concatenated, params, np.ones((5, 3)))
    assert [family.name for family in groups.families] == ["units of a", "units of b"]
    figure = plot.plot_groups(groups, params)
    blue, orange, grey = to_rgba("C0"), to_rgba("C1"), to_rgba("0.85")
    wide = {length: math.log2(length + 1) for length in (2, 5)}
    expected = {
        (0, grey): [(0, 2), (2.25, 2.25 + wide[2])],
        (0, blue): [(2.25, 2.25 + wide[2])],
        (1, grey): [(0, 2), (2.25, 4.25)],
        (1, orange): [(2.25, 4.25)],
        (2, grey): [(0, wide[5]), (wide[5] + 0.25, wide[5] + 0.25 + wide[2])],
        (2, blue): [(0, wide[5] * 2 / 5)],
        (2, orange): [(wide[5] * 2 / 5, wide[5])],
    }
    found = boxes(figure)
    assert found.keys() == expected.keys()  # a scalar has no boxes
    for at, spans in expected.items():
        np.testing.assert_allclose(found[at], spans, rtol=1e-6)


@given(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_a_bar_is_the_fraction_that_is_kept(mask):
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    (axes,) = plot.plot_widths(groups, {"units of up": np.array(mask)}).axes
    whole, kept = axes.patches
    assert (whole.get_width(), kept.get_width()) == (1, sum(mask) / 4)
    assert axes.texts[0].get_text() == f"{sum(mask)} of 4"
    cost = f"parameters: {6 * sum(mask)} of 24 ({sum(mask) / 4:.1%})"
    assert axes.get_title(loc="left").splitlines()[0] == cost


def test_a_family_that_is_left_out_is_whole():
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    (axes,) = plot.plot_widths(groups, {}).axes
    assert axes.texts[0].get_text() == "4 of 4"


def test_shapes_and_nodes_are_drawn_like_arrays():
    groups = jc.coupled_groups(mlp, MLP, np.ones((5, 3)))
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), MLP)
    expected = boxes(plot.plot_groups(groups, MLP))
    for params in (jax.eval_shape(lambda: arrays), jc.quantize_tree(arrays)):
        assert boxes(plot.plot_groups(groups, params)) == expected


def test_nothing_coupled_is_a_picture_too():
    groups = jc.program.coupling.Groups((), (), (), ())
    for figure in (plot.plot_groups(groups, {}), plot.plot_widths(groups, {})):
        figure.savefig(io.BytesIO(), format="png")


def chain(params, x):
    for layer in params.values():
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x


@pytest.mark.parametrize("prefix", ["a", "/".join(["of_a_long_name"] * 6)])
def test_no_text_lies_on_another_or_outside(prefix):
    from matplotlib.text import Text

    lengths = (3, 1, 5000, 2, 70, 2, 4)
    params = {
        f"{prefix}/{i}": {"kernel": np.ones((a, b)), "bias": np.ones(b)}
        for i, (a, b) in enumerate(itertools.pairwise(lengths))
    }
    groups = jc.coupled_groups(chain, params, np.ones((5, 3)))
    assert len(groups.families) >= 4
    for figure in (plot.plot_groups(groups, params), plot.plot_widths(groups, {})):
        figure.savefig(io.BytesIO(), format="png")
        drawn = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        extents = [text.get_window_extent() for text in drawn]
        for box in extents:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        for one, other in itertools.combinations(extents, 2):
            assert not one.overlaps(other)
