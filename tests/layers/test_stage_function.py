"""What a stage computes beside its layers: the loss, and metrics with names of their own."""

import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.stage_function import stage_function
from meshpipe.layers.stage_wiring import StageWiring
from meshpipe.layers.wiring import Field


@pytest.mark.parametrize("name", ["loss", "step"])
def test_a_metric_cannot_take_the_place_of_another_value(name: str) -> None:
    def metrics(output, batch):  # type: ignore[no-untyped-def]
        return {"accuracy": (output.sum(), 1), name: (output.sum(), 1)}

    run = stage_function(
        0,
        abstract_layers([jnp.sin], ["inputs"]),
        wiring=StageWiring(inputs=(Field("inputs"),), keywords=((),), outputs=()),
        loss=lambda output, batch: (output.sum(), 1),
        metrics=metrics,
        train=False,
    )
    zero = jnp.uint32(0)
    with pytest.raises(
        ValueError, match=f"A metric must not have a name that the results of a step .* have. Got {name}."
    ):
        run({}, {}, (), {"inputs": np.ones(3, np.float32)}, (zero, jnp.zeros(0), zero, zero))
