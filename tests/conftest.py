"""What every test runs under: see STYLE.md, rule 32."""

import os
import subprocess
import sys

import jax
import pytest
from hypothesis import HealthCheck, settings


settings.register_profile(
    "jaxcomp",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=30,
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


@pytest.fixture
def on_eight_devices():
    """Runs a file as a script where there are eight virtual devices: what it prints."""

    def run(path):
        # A process of its own: devices are counted when JAX starts.
        flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
        flags += " --xla_force_host_platform_device_count=8"
        found = subprocess.run(
            [sys.executable, path],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout.splitlines()

    return run
