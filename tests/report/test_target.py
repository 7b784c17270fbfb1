"""The tables of `plan --target`: a step on a described machine."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_recipes
from rich.console import Console

from meshpipe.choose.step_prediction import StepPrediction, predict_step
from meshpipe.compiled.compile_for import compile_for
from meshpipe.hardware.hardware import Hardware
from meshpipe.plan.plan import Op
from meshpipe.report.memory_picture import draw_memory
from meshpipe.report.tables import format_seconds
from meshpipe.report.target import print_prediction
from meshpipe.runs.build import make_chooser

MACHINE = {
    "name": "slow",
    "platform": "cpu",
    "device_kind": "slow",
    "flops": {"float32": 1e6},
    "memory_bytes": 2**16,
    "memory_bandwidth": 1e9,
    "host_link": 1e6,
    "network_link": 1e6,
    "host_latency": 0,
    "network_latency": 0,
    "devices_per_host": 2,
    "efficiency": {"products": 1, "memory": 1, "links": 1, "network": 1},
}
WIDTH = tiny_recipes.DenseConfig().width


@pytest.fixture(scope="module")
def prediction() -> StepPrediction:
    chooser = make_chooser(tiny_recipes.pipeline())
    model = chooser.choose()
    programs = compile_for(model, chooser.transformation)
    return predict_step(model, chooser.transformation, programs, Hardware.of(MACHINE), tokens=64)


def text_of(prediction: StepPrediction, target: str = "slow.json:2") -> str:
    console = Console(width=240, record=True, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    print_prediction(console, target, prediction)
    return console.export_text()


def test_times_follow_from_operations_and_the_machine(prediction: StepPrediction) -> None:
    # Two layers of a stage, for the 4 examples of a microbatch, at 1e6 operations a second.
    product = 2 * 4 * WIDTH * WIDTH / 1e6
    assert prediction.of_action(0, Op.FORWARD) == pytest.approx(2 * product)
    assert prediction.of_action(0, Op.BACKWARD) == pytest.approx(3 * product)
    assert prediction.timeline.transfer == pytest.approx(4 * WIDTH * 4 / 1e6)
    assert prediction.step_seconds > prediction.timeline.makespan > 0
    assert prediction.throughput == pytest.approx(64 / prediction.step_seconds)
    count = prediction.timeline.plan.num_microbatches
    assert sum(prediction.flops.values()) == pytest.approx((3 * 4 - 1) * count * 2 * 4 * WIDTH * WIDTH)
    least = sum(prediction.flops.values()) / 1e6 / 2
    assert prediction.utilisation == pytest.approx(least / prediction.step_seconds)
    assert 0.2 < prediction.utilisation < 1


def test_tables_say_what_xla_made_and_whether_it_fits(prediction: StepPrediction) -> None:
    text = text_of(prediction)
    for words in ("forward", "backward", "update", "temporaries", "aliased", "peak in", "tokens/s", "MFU", "bubble"):
        assert words in text
    assert "It fits: rank" in text
    small = replace(prediction, hardware=replace(prediction.hardware, memory_bytes=1000))
    missing = small.fullest.total - 1000
    assert small.missing == missing
    assert "It does not fit: rank" in text_of(small)
    rank = prediction.ranks[0]
    assert sum(rank.parts.values()) == rank.total
    assert rank.transfers > 0


@pytest.mark.parametrize("limit", [2**13, 2**40])
def test_memory_is_drawn_in_parts_against_the_limit(prediction: StepPrediction, limit: int, tmp_path: Path) -> None:
    draw_memory(prediction.ranks, limit, "tiny", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 5000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"),
        (1.16e-11, "< 0.1 us"),
        (1e-7, "0.1 us"),
        (9.996e-4, "1 ms"),
        (0.0123456, "12.3 ms"),
        (0.9996, "1 s"),
        (12345.6, "12,346 s"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
