"""The names of JAX that coordination relies on; tests/multiprocess uses it in earnest."""

from jax._src import distributed

from meshpipe.processes.coordination import coordinator_address, process_count, process_index


def test_one_process_needs_no_service() -> None:
    assert distributed.global_state.client is None
    assert (process_count(), process_index(), coordinator_address()) == (1, 0, None)
