"""What is trained, apart from where and how: the layers, their loss and the shape of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from meshpipe.layers.layer import LayerLike
from meshpipe.layers.stage_function import Loss, Metrics
from meshpipe.sharding import ShardingRules


@dataclass(frozen=True)
class Task:
    """A model and its loss, as `Trainer` and `verify` take them and a recipe's `Config.task` makes them."""

    layers: Sequence[LayerLike]
    """NNX modules or their constructors, in the order in which they are called."""
    loss: Loss
    """Output of the last layer and a microbatch -> sum of the losses, and their weight; both scalars."""
    _: KW_ONLY
    batch: Mapping[str, Any]
    """An example of a global batch, arrays or shapes: every field is `[batch, ...]`."""
    input: str = "inputs"
    """Field of the batch that the first layer is called with."""
    metrics: Metrics | None = None
    """Output of the last layer and a microbatch -> further sums and weights to report in evaluation, by name."""
    tied: Sequence[Sequence[str]] = ()
    """Groups of leaf paths that are one parameter; the first path of a group owns it."""
    rules: ShardingRules = field(default_factory=ShardingRules)
    """Which mesh axis each logical axis of a parameter is split over."""
