"""Files of every version of the format stay readable."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.node import flatten


FILES = Path(__file__).parent / "files"  # one of each version, as it was written then


def described(leaf):
    """What a leaf must be: its kind and, if it is an array, its bits."""
    if not hasattr(leaf, "dtype"):
        return repr(leaf)
    kind = leaf.describe() if jc.is_compressed(leaf) else str(leaf.dtype)
    if isinstance(leaf, jc.TiedTensor):
        return kind
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf.dense() if jc.is_compressed(leaf) else leaf)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return f"{kind} {list(array.shape)} {digest}"


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_that_version_still_holds_what_it_held(version):
    tree = jc.load(FILES / f"version{version}.jxc")
    found = dict(zip(*flatten(tree)[:2], strict=True))
    expected = json.loads((FILES / "expected.json").read_text())
    held = {path: leaf for path, leaf in expected.items() if path in found}
    assert {path: described(leaf) for path, leaf in found.items()} == held
    assert len(held) == len(expected) - (4 if version == 1 else 0)


def test_the_first_version_has_no_notes_and_the_second_says_who_made_it():
    assert jc.read_notes(FILES / "version1.jxc") == {}
    notes = jc.read_notes(FILES / "version2.jxc")
    assert notes["jaxcomp"] == "0.1.0"
    assert notes["recipe"] == {"bits": 4}
