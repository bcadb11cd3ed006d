"""Eight simulated devices on the CPU for every test; must run before jax is imported."""

import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Compiled programs are shared between tests, workers and the processes that tests start.
cache = pathlib.Path(tempfile.gettempdir()) / f"dqjax-test-compilations-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import pytest  # noqa: E402

import tests.typecheck  # noqa: E402, F401 - the hook finds it by name
from jaxtyping import install_import_hook  # noqa: E402

# Shapes in signatures are checked in the tests only.
CHECKED = ["dqjax.kernels", "dqjax.losses", "dqjax.steps", "dqjax.models", "dqjax.rollout"]
install_import_hook(CHECKED, "tests.typecheck.check")

ORACLES = "torch", "trl"  # not installed with [test] on Python 3.12 and newer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if sys.version_info >= (3, 12) and error.name in ORACLES:
            pytest.skip(f"{error.name} is not installed")
        raise
