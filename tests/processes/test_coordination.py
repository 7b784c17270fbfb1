"""The private names of JAX that coordination relies on; tests/multiprocess tests real processes."""

import sys
from types import ModuleType

import jax
import pytest

from meshpipe.processes.coordination import _name, _service, coordinator_address, process_count, process_index


def test_one_process_needs_no_service() -> None:
    assert not jax.distributed.is_initialized()
    assert (process_count(), process_index(), coordinator_address()) == (1, 0, None)


def test_the_private_names_are_where_they_were() -> None:
    service = _service()
    assert service.client is None
    from jax._src import distributed

    # The store's methods that this package calls.
    names = dir(distributed._jax.DistributedRuntimeClient)
    assert {
        "key_value_set",
        "key_value_try_get",
        "key_value_dir_get",
        "wait_at_barrier",
    } <= set(names)


def test_a_moved_name_is_reported_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax._src.distributed", ModuleType("jax._src.distributed"))
    with pytest.raises(RuntimeError, match=rf"jax {jax.__version__} does not have it .* or run one process"):
        _service()


def test_keys_of_a_folder_share_one_folder_of_the_store() -> None:
    """Deleting a key deletes those below it."""
    folder, key = _name("meshpipe/checkpoint/0"), _name("meshpipe/checkpoint/0/part/1")
    assert key.startswith(f"{folder}/")
    assert not _name("meshpipe/checkpoint/01").startswith(folder)
    assert "checkpoint" not in key
