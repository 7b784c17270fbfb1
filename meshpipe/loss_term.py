"""A term that a layer adds to the loss."""

from typing import Any

from flax import nnx


class LossTerm(nnx.Variable[Any]):
    """The type of a term that a layer adds to the loss: `self.sow(meshpipe.LossTerm, "balance", value)`.

    The value is a sum over the microbatch, already times its coefficient. Arrays are added up, and so is what several
    calls and layers sow under one name. Like the sum that the loss returns, the sum over the whole batch is divided
    once, by the weight of the loss over the whole batch.
    """
