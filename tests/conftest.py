"""Eight virtual CPU devices for every test, taken before JAX starts, and the types and shapes of calls checked."""

import gc
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA sizes its thread pool from NPROC; fewer than twice the devices can deadlock programs with collectives (jax 0.10).
os.environ.setdefault("NPROC", "16")
# Tests compile many of the same programs, in several processes: JAX keeps them in a folder of this run. Workers and
# processes that tests start inherit it.
PROGRAMS = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="programs-")
if PROGRAMS is not None:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from hypothesis import HealthCheck, settings
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

# Not by an environment variable: commands that tests start have to take their own devices.
jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parent.parent
install_import_hook(
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "meshpipe").rglob("*.py")
        # Plans are left unchecked: millions of small calls on plain data, which the check makes forty times slower.
        if ROOT / "meshpipe" / "plan" not in path.parents and path.stem != "__init__"
    ],
    "beartype.beartype",
)

from meshpipe.report import phases

# Commands say which phases take long, as any may on a busy machine; tests of what they say set the limit themselves.
phases.QUIET_SECONDS = float("inf")

# The same examples in every run, which may take as long as they do.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("tests")

# What was imported stays. Looking through it for garbage took most of a twentieth of the time of all tests.
gc.freeze()

STARTED = time.monotonic()

# Processes that tests start must hear signals, even where the tests were started by nohup or in the background of a
# shell script, which ignore them.
if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _devices() -> None:
    """JAX starts before the first test: a command that runs in this process would take fewer devices."""
    assert jax.devices()


@pytest.fixture(autouse=True)
def _settings_of_jax_stay() -> Iterator[None]:
    """What a test changes for good would change those that come after it."""
    before = dict(jax.config.values)
    yield
    assert {name: jax.config.values[name] for name in before} == before  # an import may add others


@pytest.fixture
def without_the_cache_of_jax(_settings_of_jax_stay: None) -> Iterator[None]:
    """Every program is compiled. JAX may have one from another test, and those that it loads cannot be copied."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--time-limit",
        type=float,
        default=float("inf"),
        help="seconds after which no further test is started: the rest is reported as skipped",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROGRAMS is not None:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if time.monotonic() - STARTED > limit:
        pytest.skip(f"not started: the time limit of {limit:.0f} s was reached")
