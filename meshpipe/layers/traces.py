"""What tracing a model finds."""

from typing import NamedTuple

from meshpipe.plan.graph import Value
from meshpipe.stage.spec import Boundary
from meshpipe.stage.traced import TracedStage


class Traces(NamedTuple):
    """The traced stages, and what was found of all of them."""

    stages: dict[int, TracedStage]
    """Those that were wanted."""
    last: tuple[Boundary, ...]
    """The boundaries of what the last stage hands on."""
    sums: dict[int, tuple[str, ...]]
    """The names of what every stage adds up."""
    values: dict[Value, Boundary]
    """The boundaries of all values of the graph."""
