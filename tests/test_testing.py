import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp import testing


def tree(*values, shape=(2, 4)):
    return {"kernel": jnp.array(values).reshape(shape), "bias": jnp.ones(3)}


HALF = tree(0.0, 1.0, 2.0, 0.0, 0.0, -1.0, 0.5, 0.0)


def test_sparsity_counts_the_selected_leaves_only():
    testing.assert_sparsity(HALF, 0.5)
    with pytest.raises(AssertionError, match=r"Expected sparsity 0.9, found 0.5000"):
        testing.assert_sparsity(HALF, 0.9)


def test_sparsity_tells_of_strays_in_the_state_of_the_optimizer():
    tx = optax.chain(optax.adam(0.1), jc.keep_zeros())
    state = tx.init(HALF)
    testing.assert_sparsity(HALF, 0.5, state=state)
    bad = (state[0], state[1]._replace(stray=jnp.int32(7)))
    with pytest.raises(AssertionError, match=r"but 7 weights .* link last"):
        testing.assert_sparsity(HALF, 0.5, state=bad)


def test_sparsity_sees_through_nodes_and_ties():
    both = {"a": HALF, "b": {k: v for k, v in HALF.items()}}
    tied = jc.tie_layers(both, [("a", "b")])
    testing.assert_sparsity(jc.quantize_tree(tied, bits=4), 0.5)


def test_nm_sparsity_is_checked_along_the_axis():
    testing.assert_nm_sparse(HALF, 2, 4, along=1)
    testing.assert_nm_sparse(np.array([0.0, 1.0, 1.0, 0.0]), 1, 2)
    with pytest.raises(AssertionError, match="at most 1 of 4 non-zero, but 2 of 2"):
        testing.assert_nm_sparse(HALF, 1, 4, along=1)
    tail = np.array([1.0, 0.0, 0.0, 1.0, 1.0])  # groups of three and of two
    testing.assert_nm_sparse(tail, 2, 3)
    with pytest.raises(AssertionError, match="at most 1 of 3 non-zero, but 1 of 2"):
        testing.assert_nm_sparse(tail, 1, 3)


def test_at_most_k_values_counts_zero_as_one():
    testing.assert_at_most_k_values(HALF, 5)
    with pytest.raises(AssertionError, match="at most 4 .* 'kernel' has 5"):
        testing.assert_at_most_k_values(HALF, 4)


def test_on_grid_takes_a_number_or_a_step_per_column():
    testing.assert_on_grid(HALF, 0.5)
    testing.assert_on_grid(np.array([[1.0, 0.3]]), np.array([0.5, 0.1]))
    with pytest.raises(AssertionError, match=r"multiples of 1.0, .* 0.5 at \(1, 2\)"):
        testing.assert_on_grid(HALF, 1.0)


def test_a_quantized_leaf_is_on_the_grid_of_its_scales():
    q = jc.quantize(jnp.linspace(-1, 1, 12).reshape(3, 4), bits=4)
    testing.assert_on_grid(q.dense(), q.scale.reshape(1, 4))


def test_same_function_compares_results():
    testing.assert_same_function(jnp.sin, np.sin, np.arange(4.0, dtype=np.float32))
    with pytest.raises(AssertionError, match="differ"):
        testing.assert_same_function(jnp.sin, jnp.cos, jnp.arange(4.0))
