import builtins

import jax
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
