"""What every test runs under: see STYLE.md, rule 32."""

import jax
import pytest
from hypothesis import HealthCheck, settings


settings.register_profile(
    "jaxcomp",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=12,
    # `strict` is a function's fixture, and holds for every example alike.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("jaxcomp")


@pytest.fixture(autouse=True)
def no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield
