"""Layers measured: every one, equal ones once, and bytes as they are predicted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from small_model import LAYERS, batches, loss

from meshpipe.choose import counted, profile
from meshpipe.choose.chooser import Chooser
from meshpipe.choose.memory import stage_memory
from meshpipe.choose.profile import operations_of_layers
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.phases import listening
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.layer_costs import ModelCosts, Setting
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


def test_layers_that_do_not_fit_are_counted(monkeypatch: pytest.MonkeyPatch, compiled: list[int]) -> None:
    monkeypatch.setattr(counted, "free_memory", lambda: 1000)
    costs = chooser().measure()
    assert not compiled
    assert costs.counted is not None
    assert costs.counted.startswith("to measure its largest layer takes")
    enter, mix, center, again, leave = costs.layers
    assert mix is again
    assert (enter.kind, center.kind, leave.kind) == ("Enter", "Center", "Leave")
    assert mix.forward > center.forward > 0
    assert mix.backward > center.backward > 0
    # The two parts do the same work, and read some values twice.
    assert mix.backward < mix.backward_input + mix.backward_weight < 2 * mix.backward
    assert center.backward_weight == 0  # it has no parameters
    assert [layer.transfer > 0 for layer in costs.layers] == [True] * 4 + [False]
    assert [layer.parameter_bytes for layer in costs.layers] == [288, 1184, 0, 1184, 364]
    assert "counted at 200 TFLOP/s" in costs.describe()
    assert "measured" not in costs.describe()


def test_layers_that_take_long_are_counted_and_the_reason_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(counted, "CORE", 1.0)
    why = chooser().measure().counted
    assert why is not None
    assert why.startswith("to measure them on cpu takes about ")


def test_a_reason_to_count_can_be_given(compiled: list[int]) -> None:
    costs = replace(chooser(schedule="auto"), count_because="there is no accelerator").choose().layer_costs
    assert costs is not None
    assert costs.counted == "there is no accelerator"
    assert not compiled


def test_what_is_measured_and_how_long_it_may_take_is_told() -> None:
    heard: list[str] = []
    with listening(lambda phase: heard.append(str(phase))):
        chooser().measure()
    assert "Compiling the layers, kind of layer 1 of 4" in heard
    assert "Measuring on cpu (about 1 s), layer 5 of 5" in heard


def test_counted_costs_are_saved_as_such(tmp_path: Path) -> None:
    costs = replace(chooser(), count_because="there is no accelerator").measure()
    costs.save(tmp_path / "costs.json")
    assert ModelCosts.load(str(tmp_path / "costs.json")) == replace(costs, file=str(tmp_path / "costs.json"))
