"""Programs that several tests of a run compile (both schedules of a layout, say) are compiled once."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of compiled programs that lives as long as the run; a program that a test changes is another program."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    options = {**OPTIONS, "jax_compilation_cache_dir": str(folder)}
    before = {name: jax.config.read(name) for name in options}
    _configure(options)
    yield
    _configure(before)


def _configure(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
