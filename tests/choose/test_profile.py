"""Layers measured: every one, equal ones once, and bytes as they are predicted."""

from typing import Any

import jax
import optax
import pytest
from small_model import LAYERS, batches, loss

from meshpipe.choose import profile
from meshpipe.choose.chooser import Chooser
from meshpipe.choose.memory import stage_memory
from meshpipe.choose.profile import operations_of_layers
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.layer_costs import Setting
from meshpipe.plan.plan import Op


def chooser(**pipeline: Any) -> Chooser:
    return Chooser(
        Task(LAYERS, loss, batch=batches(1)[0]),
        optax.sgd(0.1),
        mesh=make_mesh(2, 2),
        config=PipelineConfig(num_microbatches=2, **pipeline),
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stages that were compiled."""
    indices: list[int] = []
    compile_stage = profile.compile_stage

    def compile_and_note(stage: Any, *arguments: Any, **keywords: Any) -> Any:
        indices.append(stage.spec.index)
        return compile_stage(stage, *arguments, **keywords)

    monkeypatch.setattr(profile, "compile_stage", compile_and_note)
    return indices


def test_every_layer_is_measured_and_equal_ones_once(compiled: list[int]) -> None:
    asked = chooser()
    costs = asked.measure()
    assert [layer.kind for layer in costs.layers] == ["Enter", "Mix", "Center", "Mix", "Leave"]
    assert costs.layers[1] is costs.layers[3]  # although their dropout masks differ
    assert sorted(compiled) == [0, 1, 2, 4]
    for layer in costs.layers:
        for op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT):
            assert 0 < layer.time(op) < 1
    assert [layer.backward_weight > 0 for layer in costs.layers] == [True, True, False, True, True]
    assert [layer.transfer > 0 for layer in costs.layers] == [True] * 4 + [False]
    assert [layer.parameter_bytes for layer in costs.layers] == [288, 1184, 0, 1184, 364]
    model = asked.layer_by_layer(asked.mesh)
    predicted = [memory.activation for memory in stage_memory(model, asked.transformation)]
    assert [layer.activation_bytes for layer in costs.layers] == pytest.approx(predicted, rel=0.25)  # on two devices
    assert costs.setting == Setting(microbatch_size=8, data=2, tensor=1, remat="none")
    assert costs.device == "cpu"


def test_a_batch_given_by_its_shapes_and_layers_computed_again() -> None:
    asked = chooser(remat="full")
    model = asked.layer_by_layer(asked.mesh)
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batches(1)[0].items()}
    found = profile.profile_layers(model, shapes)
    kept = [layer.activation_bytes for layer in found.layers]
    assert kept == [memory.activation for memory in stage_memory(model, asked.transformation)]


def test_operations_of_layers() -> None:
    asked = chooser()
    enter, mix, center, again, _ = operations_of_layers(asked.layer_by_layer(asked.mesh))
    product = 2 * 8 * 8 * 8
    assert 2 * product <= enter < 2.5 * product  # no gradient of the input
    # Two products of twice the width, each with two in backward; bias and activation, of which backward repeats a part.
    assert 12 * product <= mix < 18.2 * product
    assert again == mix
    assert center < product
