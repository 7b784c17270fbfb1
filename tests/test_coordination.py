"""The names of JAX that coordination relies on; tests/multiprocess uses it in earnest."""

from jax._src import distributed

from meshpipe.coordination import process_count, process_index


def test_one_process_needs_no_service() -> None:
    assert distributed.global_state.client is None
    assert (process_count(), process_index()) == (1, 0)
