"""Which process of its run this is, read from flags that may be wrong otherwise."""

import pytest

from meshpipe.cli.place import place_of
from meshpipe.processes.config import DistributedConfig

SECOND = ["--coordinator", "10.0.0.5:4321", "--process-count", "2", "--process-id=1"]


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["mine:small", "--steps", "3"], None),
        (["mine:small", *SECOND], 1),
        (["mine:small", "--no-such-flag", "7", *SECOND, "--steps", "many"], 1),
        (["mine:small", "--coordinator", "10.0.0.5:4321", "--process_count", "3", "--process_id", "2"], 2),
        (["mine:small", *SECOND, "--process-id", "0"], 0),
        (["mine:small", *SECOND, "--process-id", "2"], None),
        (["mine:small", *SECOND, "--process-id", "two"], None),
        (["mine:small", *SECOND, "--process-id"], None),
        (["mine:small", "--process-id", "1"], None),
    ],
)
def test_the_place_is_found_among_wrong_flags(arguments: list[str], number: int | None) -> None:
    assert place_of(arguments).process_id == number
    assert (place_of(arguments) == DistributedConfig()) == (number is None)
