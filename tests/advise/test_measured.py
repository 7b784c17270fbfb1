"""Layers that are measured on the devices at hand, and the settings in which they are."""

from dataclasses import replace

import jax
import pytest

from meshpipe.advise.candidates import Space
from meshpipe.advise.cases import Case, Cases, cases_of
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.measure_layers import measure_layers
from meshpipe.advise.measured import LayerLines, Line, Measured
from meshpipe.advise.times import Roofline, Seconds
from meshpipe.advise.work import ModelWork
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.models import LanguageModelConfig
from meshpipe.plan.plan import Op

MODEL = LanguageModelConfig(d_model=32, num_blocks=4, num_heads=4, num_kv_heads=4, d_hidden=64)
CONFIG = Config(model=MODEL, data=TextFilesConfig(sequence_length=32), batch_size=16)
H100 = find_hardware("h100")


def estimator(work: ModelWork, **changes: object) -> Estimator:
    hardware = replace(H100, **changes)
    return Estimator(work, Roofline(work, hardware), hardware, 16)


def space(**fixed: object) -> Space:
    return Space(num_devices=4, batch_size=16, num_layers=6, fixed=fixed)


def test_a_line_goes_through_its_points_and_beyond() -> None:
    line = Line([(1.0, 2.0), (4.0, 5.0), (16.0, 29.0)])
    assert [line.of(examples) for examples in (1.0, 2.0, 4.0, 10.0, 16.0, 17.0)] == [2, 3, 5, 17, 29, 31]
    assert Line([(4.0, 1.0), (8.0, 9.0)]).of(1.0) == 0  # no time is below 0


def test_a_layer_takes_what_was_measured_of_it() -> None:
    def layer(forward: float, backward: float) -> LayerLines:
        programs = {Op.FORWARD: Line([(0.0, 0.0), (1.0, forward)]), Op.BACKWARD: Line([(0.0, 0.0), (1.0, backward)])}
        return LayerLines(programs, {"layer": Line([(0.0, 0.0), (1.0, 1.0)])})

    times = Measured({1: [layer(4.0, 8.0)], 2: [layer(3.0, 5.0)]}, [True])
    assert times.seconds(0, Op.FORWARD, 2.0, Layout()) == Seconds(8.0)
    # Half of 8, and what the tensor axis adds to that.
    assert times.seconds(0, Op.BACKWARD, 1.0, Layout(tensor=2, remat="layer")) == Seconds(4.0, 1.0, 1.0)
    assert times.seconds(0, Op.BACKWARD_WEIGHT, 1.0, Layout()) == Seconds()


def test_every_size_of_the_tensor_axis_is_measured(work: ModelWork) -> None:
    found = cases_of(space().layouts(), estimator(work))
    plain = {(case.tensor, case.examples) for case in found.cases if case.remat == "none"}
    assert plain == {(tensor, examples) for tensor in (1, 2) for examples in (1, 4, 16)}
    assert {case.remat for case in found.cases} == {
        "none",
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
        "layer",
    }
    assert found.splits
    settled = cases_of(space(tensor=2, remat="none", schedule="1f1b").layouts(), estimator(work))
    assert {(case.tensor, case.remat) for case in settled.cases} == {(2, "none")}
    assert not settled.splits


@pytest.mark.parametrize("scarce", ["memory", "time"])
def test_fewer_examples_are_measured_where_many_do_not_fit_or_take_long(work: ModelWork, scarce: str) -> None:
    def most(power: float) -> int:
        changes = {"memory_bytes": int(10**power)} if scarce == "memory" else {"flops": {"bfloat16": 10**power}}
        cases = cases_of(space(schedule="1f1b").layouts(), estimator(work, **changes)).cases
        return max((case.examples for case in cases), default=0)

    found = [most(power / 3) for power in range(36, 8, -1)]
    assert found == sorted(found, reverse=True)
    assert set(found) > {16, 0}  # and something between


@pytest.mark.slow
def test_layers_are_measured_on_all_devices() -> None:
    cases = Cases([*(Case(tensor, size) for tensor in (1, 2) for size in (1, 8)), Case(1, 8, "layer")])
    times = measure_layers(CONFIG, jax.devices()[:4], cases)
    assert set(times.layers) == {1, 2}
    assert list(times.is_split) == [True] * 6
    for tensor in (1, 2):
        one, eight = (times.seconds(2, Op.BACKWARD, examples, Layout(tensor=tensor)) for examples in (1.0, 8.0))
        assert 0 < one.total < eight.total < 8 * one.total
        assert times.layers[tensor][1] == times.layers[tensor][4]  # equal layers are measured once
    block, embedding = (times.seconds(place, Op.BACKWARD, 8.0, Layout(remat="layer")) for place in (2, 0))
    assert 0 < block.recompute < 2 * times.seconds(2, Op.FORWARD, 8.0, Layout()).total
    assert embedding.total < block.total
