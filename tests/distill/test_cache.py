"""A cached teacher says what the live one says, and survives being stopped."""

import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.distill.cache import cache_teacher, open_cache
from jaxcomp.distill.losses.logits import soft_target_loss
from jaxcomp.distill.losses.sparse import sparse_target_loss, top_k_targets
from jaxcomp.distill.outputs import Outputs


CLASSES = 5
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(3, CLASSES)).astype(np.float32)}
X = RNG.normal(size=(10, 3)).astype(np.float32)
BATCHES = [X[:4], X[4:8], X[8:]]  # the last is shorter
ALL = np.arange(len(X))


def model(params, x):
    return x @ params["kernel"]


def given_logits(params, inputs):
    return inputs + params


def live(params=PARAMS):
    return np.concatenate([jax.jit(model)(params, x) for x in BATCHES])


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stopped_after(count, batches=BATCHES):
    yield from batches[:count]
    raise KeyboardInterrupt


class Counted:
    """How often the teacher was run, from inside its compiled code."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, x):
        jax.debug.callback(self.count)
        return model(params, x)

    def count(self):
        self.calls += 1


def test_logits_in_float32_are_the_live_ones_in_any_order(tmp_path):
    cache = cache_teacher(model, PARAMS, BATCHES, tmp_path, dtype=jnp.float32)
    assert len(cache) == len(open_cache(str(tmp_path))) == 10
    asked = np.array([[9, 0], [3, 3], [8, 5]])
    found = cache.rows(asked)
    assert type(found) is np.ndarray
    assert (found.dtype, found.shape) == (np.float32, (3, 2, CLASSES))
    np.testing.assert_array_equal(found, live()[asked])
    student = jnp.zeros((10, CLASSES))
    np.testing.assert_array_equal(
        soft_target_loss(student, cache.rows(ALL)), soft_target_loss(student, live())
    )
    np.testing.assert_array_equal(cache.rows(7), live()[7])
    assert cache.rows(np.zeros((0,), int)).shape == (0, CLASSES)


@given(
    hnp.arrays(np.float32, (2, CLASSES), elements=st.floats(-65504, 65504, width=32))
)
def test_logits_in_float16_are_off_by_what_the_docs_say(tmp_path_factory, logits):
    folder = tmp_path_factory.mktemp("cache")
    zero = jnp.zeros(())
    cache = cache_teacher(given_logits, zero, [logits], folder)
    found = cache.rows(np.arange(2))
    assert found.dtype == np.float16
    error = np.abs(np.float64(found) - logits)
    assert np.all(error <= np.maximum(2.0**-11 * np.abs(logits), 3e-8))


def test_bfloat16_and_minus_infinity_are_kept(tmp_path):
    logits = np.array([[1e30, -np.inf, 0.1]], np.float32)
    cache = cache_teacher(
        given_logits, jnp.zeros(()), [logits], tmp_path, dtype=jnp.bfloat16
    )
    np.testing.assert_array_equal(
        cache.rows([0]), logits.astype(ml_dtypes.bfloat16), strict=True
    )
    half = cache_teacher(
        given_logits, jnp.zeros(()), [logits[:, 1:]], tmp_path / "half"
    )
    assert half.rows([0])[0, 0] == -np.inf


@pytest.mark.parametrize(
    ("value", "name"), [(65520.0, "float16"), (-1e9, "float16"), (np.nan, "float32")]
)
def test_a_logit_that_cannot_be_kept_is_an_error_that_says_where(tmp_path, value, name):
    bad = np.zeros((2, 3), np.float32)
    bad[1, 2] = value
    batches = [np.zeros_like(bad), bad]
    with pytest.raises(ValueError, match=rf"in {name}, .* batch 1 has .* \(1, 2\)\."):
        cache_teacher(given_logits, jnp.zeros(()), batches, tmp_path, dtype=name)


def test_top_k_is_what_top_k_targets_gives(tmp_path):
    cache = cache_teacher(
        model, PARAMS, BATCHES, tmp_path, top_k=2, temperature=2.0, dtype=jnp.float32
    )
    found, wanted = cache.rows(ALL[::-1]), top_k_targets(live()[::-1], 2, 2.0)
    assert (found.indices.dtype, found.probs.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(found.indices, wanted.indices)
    np.testing.assert_allclose(found.probs, wanted.probs, rtol=1e-6)
    stored = safetensors.numpy.load_file(tmp_path / "00000.safetensors")
    assert stored["indices"].dtype == np.uint16
    assert cache.settings["temperature"] == 2.0


def test_top_k_in_float16_changes_the_loss_by_a_thousandth(tmp_path):
    cache = cache_teacher(model, PARAMS, BATCHES, tmp_path, top_k=3)
    student = jnp.asarray(live()[::-1])
    np.testing.assert_allclose(
        sparse_target_loss(student, cache.rows(ALL)),
        sparse_target_loss(student, top_k_targets(live(), 3)),
        rtol=2e-3,
        atol=2e-3,
    )


def test_classes_beyond_16_bits_keep_their_indices(tmp_path):
    logits = np.zeros((1, 70_000), np.float32)
    logits[0, 69_999] = 20.0
    cache = cache_teacher(given_logits, jnp.zeros(()), [logits], tmp_path, top_k=1)
    assert cache.rows([0]).indices == 69_999


def test_tokens_are_axes_of_an_example(tmp_path):
    logits = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    cache = cache_teacher(given_logits, jnp.zeros(()), [logits], tmp_path, top_k=2)
    assert len(cache) == 2
    assert cache.rows([1, 0, 1]).probs.shape == (3, 3, 2)


def test_each_file_is_safetensors_with_whole_batches(tmp_path):
    cache_teacher(
        model, PARAMS, BATCHES, tmp_path, dtype=jnp.float32, shard_bytes=4 * 40
    )
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [
        "00000.safetensors",
        "00001.safetensors",
        "index.safetensors",
    ]
    rows = [safetensors.numpy.load_file(file).get("logits") for file in files]
    assert rows[2] is None
    assert [len(x) for x in rows[:2]] == [8, 2]
    np.testing.assert_array_equal(np.concatenate(rows[:2]), live())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path, count):
    options = {"shard_bytes": 1, "top_k": 2}  # a shard for each batch
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cache_teacher(model, PARAMS, BATCHES, whole, **options)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(model, PARAMS, stopped_after(count), parts, **options)
    assert len(contents(parts)) == count
    if count:
        with pytest.raises(ValueError, match="needs a complete cache, but .*parts has"):
            open_cache(parts)
    teacher = Counted()
    cache_teacher(teacher, PARAMS, iter(BATCHES), parts, **options)
    jax.effects_barrier()
    assert teacher.calls == 3 - count
    assert contents(parts) == contents(whole)


def test_a_finished_cache_is_only_checked(tmp_path):
    cache_teacher(model, PARAMS, BATCHES, tmp_path)
    before, teacher = contents(tmp_path), Counted()
    cache = cache_teacher(teacher, PARAMS, BATCHES, tmp_path)
    jax.effects_barrier()
    assert teacher.calls == 0
    assert len(cache) == 10
    assert contents(tmp_path) == before


def test_a_deleted_shard_is_computed_again(tmp_path):
    options = {"shard_bytes": 1}
    cache_teacher(model, PARAMS, BATCHES, tmp_path, **options)
    before, teacher = contents(tmp_path), Counted()
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(ValueError, match="00001.safetensors, got 0: it is missing"):
        open_cache(tmp_path)
    cache_teacher(teacher, PARAMS, BATCHES, tmp_path, **options)
    jax.effects_barrier()
    assert teacher.calls == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("params", "options", "text"),
    [
        ({"kernel": PARAMS["kernel"] + 1}, {}, "'teacher': '"),
        (PARAMS, {"top_k": 2}, "'top_k': 2"),
        (PARAMS, {"dtype": jnp.float32}, "'dtype': 'float32'"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_teacher_or_setting_is_an_error(
    tmp_path, complete, params, options, text
):
    if complete:
        cache_teacher(model, PARAMS, BATCHES, tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            cache_teacher(model, PARAMS, stopped_after(1), tmp_path, shard_bytes=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"differs from .*{text}.*Use another folder"):
        cache_teacher(model, params, BATCHES, tmp_path, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("batches", "number"),
    [
        ([BATCHES[1], BATCHES[0], BATCHES[2]], 0),
        (BATCHES[:2], 2),
        ([*BATCHES, BATCHES[0]], 3),
    ],
)
def test_other_data_are_an_error_that_names_the_batch(tmp_path, batches, number):
    cache_teacher(model, PARAMS, BATCHES, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"batch {number} is another, is missing or"):
        cache_teacher(model, PARAMS, batches, tmp_path)
    assert contents(tmp_path) == before


def test_shards_of_another_size_that_do_not_join_are_an_error(tmp_path):
    cache_teacher(model, PARAMS, BATCHES, tmp_path, shard_bytes=1)
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match="to begin at batch 3, but it begins at batch"):
        cache_teacher(model, PARAMS, BATCHES, tmp_path)


def test_a_shard_that_is_cut_off_or_damaged_is_an_error_that_names_it(tmp_path):
    cache_teacher(model, PARAMS, BATCHES, tmp_path, shard_bytes=1)
    file = tmp_path / "00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="00001.safetensors, got .*it is cut off. Del"):
        open_cache(tmp_path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cache = open_cache(tmp_path)
    np.testing.assert_array_equal(cache.rows([0, 9]), np.float16(live()[[0, 9]]))
    for call in (
        lambda: cache.rows([5]),
        lambda: cache_teacher(model, PARAMS, BATCHES, tmp_path, shard_bytes=1),
    ):
        with pytest.raises(ValueError, match="00001.safetensors damaged: .*Delete it"):
            call()


def test_a_shard_of_another_cache_or_another_file_is_an_error(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    cache_teacher(model, PARAMS, BATCHES, ours)
    other = {"kernel": PARAMS["kernel"] + 1}
    cache_teacher(model, other, BATCHES, theirs)
    name = "00000.safetensors"
    (ours / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(ValueError, match="00000.safetensors was made with"):
        open_cache(ours).rows([0])
    jc.save(ours / "index.safetensors", {"kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match="is no part of the cache of a teacher"):
        open_cache(ours)


def test_no_cache_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="open_cache needs a folder that"):
        open_cache(tmp_path)


def test_compressed_teachers_and_outputs(tmp_path):
    small = jc.quantize_tree(PARAMS, bits=4)

    def teacher(params, inputs):
        return Outputs(model(params, inputs["x"]))

    batches = [{"x": x} for x in BATCHES]
    cache = cache_teacher(teacher, small, batches, tmp_path, dtype=jnp.float32)
    np.testing.assert_allclose(cache.rows(ALL), live(jc.densify(small)), rtol=1e-5)


def test_training_from_the_cache_is_training_with_the_teacher(tmp_path):
    cache = cache_teacher(model, PARAMS, BATCHES, tmp_path, dtype=jnp.float32)
    tx = optax.sgd(0.5)
    ours = theirs = {"kernel": jnp.zeros((3, CLASSES))}
    kept = jc.distill_step(model, lambda spoken, x: spoken, tx, hard=0.0)
    taught = jc.distill_step(model, model, tx, hard=0.0)
    for rows in (ALL[:5], ALL[5:]):
        batch = (jnp.asarray(X[rows]), None)
        ours, _, _ = kept(ours, tx.init(ours), cache.rows(rows), batch)
        theirs, _, _ = taught(theirs, tx.init(theirs), PARAMS, batch)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("batches", "options", "kind", "text"),
    [
        ([], {}, ValueError, "needs at least one batch, got none"),
        (BATCHES, {"temperature": 2.0}, ValueError, "needs no temperature where it"),
        (
            BATCHES,
            {"temperature": 0.0, "top_k": 1},
            ValueError,
            "needs temperature > 0, got 0.0",
        ),
        (BATCHES, {"top_k": 6}, ValueError, "needs 1 <= k <= 5, got 6"),
        (
            BATCHES,
            {"dtype": jnp.int8},
            TypeError,
            "float16, bfloat16 or float32, got i",
        ),
        ([X[:0]], {}, ValueError, r"of at least one example, got float32\[0, 5\]"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(tmp_path, batches, options, kind, text):
    with pytest.raises(kind, match=text):
        cache_teacher(model, PARAMS, batches, tmp_path, **options)


def test_logits_of_two_shapes_or_of_integers_are_errors(tmp_path):
    zero = jnp.zeros(())
    ragged = [np.zeros((1, 3), np.float32), np.zeros((1, 4), np.float32)]
    with pytest.raises(ValueError, match="of one shape for all examples, got .*4.*3"):
        cache_teacher(given_logits, zero, ragged, tmp_path)
    with pytest.raises(TypeError, match="needs a floating array, got int32"):
        cache_teacher(lambda p, x: x, zero, [np.zeros((1, 3), np.int32)], tmp_path)


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        ([0, 10], IndexError, "needs 0 <= index < 10, the examples in .*, got 10"),
        ([-1], IndexError, "got -1"),
        ([0.5], TypeError, r"CachedTeacher.rows needs integers, got float64\[1\]"),
    ],
)
def test_rows_that_are_not_there_are_an_error(tmp_path, asked, kind, text):
    cache = cache_teacher(model, PARAMS, BATCHES, tmp_path)
    with pytest.raises(kind, match=text):
        cache.rows(asked)


def test_rows_are_mapped_not_read(tmp_path):
    cache = cache_teacher(model, PARAMS, BATCHES, tmp_path)
    cache.rows([0])
    header = (tmp_path / "00000.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    offset = json.loads(header[8 : 8 + size])["logits"]["data_offsets"][0] + 8 + size
    array = cache._shard(0)["logits"]
    assert isinstance(array, np.memmap)
    assert array.offset == offset
