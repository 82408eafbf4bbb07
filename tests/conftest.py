"""Eight virtual devices, strict promotion, and the fixtures that several files share."""

import contextlib
import gc
import os

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before the backend starts
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(100_000, 20, 100)  # traced programs are many objects that live long: collecting seldom saves some 5 % of the time

hypothesis.settings.register_profile("jnorm", deadline=None, derandomize=True, max_examples=15, database=None)
hypothesis.settings.register_profile("jnorm-full", parent=hypothesis.settings.get_profile("jnorm"), max_examples=100)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "jnorm"))


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of the tests that are left run the first of each N")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """A sample over all files, for an environment in which most tests ask again what another has answered."""
    n = config.getoption("--one-in")
    kept = items[::n]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n])
    items[:] = kept


COMPILED = "/jax/core/compile/backend_compile_duration"
_compilations = [0]


def _count(event, _seconds, **_):
    _compilations[0] += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def _counting():
    seen = []
    before = _compilations[0]
    yield lambda: seen[0]
    seen.append(_compilations[0] - before)


@pytest.fixture
def compilations():
    """`with compilations() as count: ...`, then `count()` is how many programs the backend compiled in the block."""
    return _counting


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """float64 for one test. The flag is back to what it was afterwards, also after a failure."""
    with jax.enable_x64(True):
        yield
    assert not jax.config.jax_enable_x64


@pytest.fixture
def unoptimized():
    """For programs that run once: LLVM takes longer to optimize one than it saves, and than all the rest together in second derivatives."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Files of programs that run once or twice. Those that look at rounding, memory, or the program itself are for the compiler as it is.
COMPILED_FAST = ("transforms", "modules", "linen", "nnx", "devices", "blend", "convert", "fine_tuning", "fold", "freeze", "inspect")
COMPILED_FAST += ("docs", "param_masks", "recalibrate", "replace_norms", "tools_scale")


@pytest.fixture(autouse=True)
def _compiled_fast(request):
    if request.path.stem.removeprefix("test_").startswith(COMPILED_FAST):
        request.getfixturevalue("unoptimized")


@pytest.fixture(autouse=True)
def _defaults_hold():
    """No test may leave a global flag changed."""
    yield
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert jax.config.jax_numpy_rank_promotion == "raise"
