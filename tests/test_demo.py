import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import jaxcomp as jc
from jaxcomp import demo
from jaxcomp.cli import app


runner = CliRunner()


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim])
    header += b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def tiny_fashion(tmp_path):
    """A folder in the format of Fashion-MNIST: two classes, told by one bright half."""
    rng = np.random.default_rng(0)
    for part, size in (("train", 512), ("t10k", 64)):
        labels = rng.integers(0, 2, size).astype(np.uint8)
        images = rng.integers(0, 60, (size, 28, 28)).astype(np.uint8)
        images[labels == 1, :14] += 150
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_the_idx_files_are_read_and_standardised(tiny_fashion):
    data = demo.load_data(tiny_fashion)
    assert data.x.shape == (512, 784) and data.test_x.shape == (64, 784)
    assert float(data.x.mean()) == pytest.approx(0, abs=1e-4)
    assert float(data.x.std()) == pytest.approx(1, abs=1e-4)
    bright = data.x.reshape(512, 2, -1).mean(axis=2)
    np.testing.assert_array_equal(bright[:, 0] > bright[:, 1] + 1, data.y == 1)


def test_a_folder_without_the_files_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz in"):
        demo.load_data(tmp_path)
    result = runner.invoke(app, ["demo", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "dataset-fashion-mnist" in result.output


def test_the_digits_are_split_alike_each_time():
    a, b = demo.load_digits(), demo.load_digits()
    assert len(a.x) + len(a.test_x) == 1797 and len(a.test_x) == 360
    np.testing.assert_array_equal(a.test_x, b.test_x)


def test_lenet_300_100_has_its_266610_parameters():
    params = demo.LeNet().init(jax.random.key(0), jnp.zeros((1, 784)))["params"]
    assert jc.report(params).total.size == 266_610


def test_the_whole_job_from_the_command_line(tiny_fashion, tmp_path, monkeypatch):
    real = demo.load_fashion
    monkeypatch.setattr(
        demo, "load_fashion", lambda f: real(f)._replace(batch=64, epochs=(2, 4, 1))
    )
    out = tmp_path / "small.jxc"
    result = runner.invoke(
        app, ["demo", "--data", str(tiny_fashion), "--seed", "3", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if "%" in line]
    assert [row.split("│")[1].strip() for row in rows] == [
        "dense, float32",
        "pruned",
        "shared, 3 bits",
        "fine-tuned",
        "file, reloaded",
    ]
    tuned, reloaded = (row.split("│")[2:5] for row in rows[-2:])
    assert tuned == reloaded  # accuracy, difference, bytes: the file is the tree
    small = jc.load(out)
    kernels = {name: layer["kernel"] for name, layer in small.items()}
    jc.testing.assert_sparsity(kernels, 0.92, where=lambda path, leaf: True)
    jc.testing.assert_at_most_k_values(kernels, 8, where=lambda path, leaf: True)
    assert 40 * out.stat().st_size < 266_610 * 4
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_inspect_shows_every_leaf_and_the_size_on_disk(tmp_path):
    file = tmp_path / "w.jxc"
    size = jc.save(file, jc.quantize_tree({"kernel": jnp.ones((50, 40))}, bits=4))
    result = runner.invoke(app, ["inspect", str(file)])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "kernel" in text and "4 bits" in text
    assert f"{size:,} bytes on disk" in text and "8,000 bytes of arrays" in text


@pytest.mark.parametrize("content", [b"", b"not a model [bold]", b"\0" * 64])
def test_inspect_of_another_file_is_one_clear_error(tmp_path, content):
    file = tmp_path / "w.jxc"
    file.write_bytes(content)
    result = runner.invoke(app, ["inspect", str(file)])
    assert result.exit_code == 1
    assert "needs a whole safetensors file" in " ".join(result.output.split())
    missing = runner.invoke(app, ["inspect", str(tmp_path / "none.jxc")])
    assert missing.exit_code == 1 and "No such file" in missing.output
