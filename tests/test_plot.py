import builtins

import jax
import numpy as np
import pytest

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
    with pytest.raises(ImportError, match=r"pip install 'jaxcomp\[plot\]'"):
        plot.save_picture(tmp_path / "p.png", {}, {}, [])


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
