"""Verify fails where weight decay reaches a frozen parameter."""

from typing import Any

import graph_models
import optax
import pytest
from graph_models import MODELS

from meshpipe import PipelineConfig, Trainer, VerifyReport, make_mesh, verify

MODEL = MODELS["only the loss"]
FROZEN = ("layers/0/linear/bias", "layers/0/linear/kernel")
DECAY, RATE = 0.1, 0.01


def report() -> VerifyReport:
    return verify(
        MODEL.layers(),
        MODEL.loss,
        optax.adamw(RATE, weight_decay=DECAY),
        batches=graph_models.batches(1),
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
        trainable=["*", "!layers/0"],
    )


@pytest.mark.slow
def test_weight_decay_of_a_frozen_parameter_is_found(monkeypatch: Any) -> None:
    found = report()
    assert found.ok, found.first
    assert not {d.path for d in found.differences if d.quantity == "gradient"}.intersection(FROZEN)
    step = Trainer.step

    def decayed(self: Trainer, *arguments: Any, **options: Any) -> Any:
        result = step(self, *arguments, **options)
        for index, stage in enumerate(self.model.parameters):
            leaves = zip(stage.state, self._training.state[index], strict=True)
            after = [leaf * (1 - RATE * DECAY) if path in FROZEN else leaf for path, leaf in leaves]
            self._training.state[index] = tuple(after)
        return result

    monkeypatch.setattr(Trainer, "step", decayed)
    wrong = {(d.quantity, d.path) for d in report().differences if not d.ok and d.update == 1}
    assert wrong == {("frozen parameter", "layers/0/linear/kernel")}  # the bias is 0
