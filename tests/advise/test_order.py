"""The order of layouts by estimate is that by measurement."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from meshpipe.advise.cases import Case, Cases
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.measure_layers import measure_layers
from meshpipe.advise.survey import survey
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="sleeping layers need a C++ compiler")
def test_estimates_have_the_order_of_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import advice
    import sleeping_layer

    sleeping_layer.register()
    fewer = [layout for layout in advice.layouts() if layout.num_microbatches == 8]
    chosen = [layout for layout in fewer if layout.schedule in ("gpipe", "interleaved-1f1b", "zb-h1", "zb-v")]
    assert len(chosen) == 10
    compared = advice.compare(1e-3, 5, chosen)
    estimated, measured = [row[1] for row in compared], [row[2] for row in compared]
    assert advice.kendall(estimated, measured) > 0.7
    assert advice.regret(estimated, measured) < 0.1
    sys.modules.pop("advice")


@pytest.mark.slow
def test_measured_layers_give_the_order_of_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import advice
    import advice_cores

    config = Config(model=advice_cores.MODELS["small"], data=TextFilesConfig(sequence_length=64), batch_size=16)
    layouts = [
        Layout(data=4),
        Layout(data=4, num_microbatches=4),
        Layout(data=4, num_microbatches=4, remat="full"),
        Layout(data=2, tensor=2, num_microbatches=8, remat="full"),
        Layout(pipeline=2, tensor=2, num_microbatches=2),
        Layout(pipeline=4, num_microbatches=16, remat="full"),
    ]
    devices = jax.devices()[:4]
    # Cores are shared, so what counts is the work of all devices: that of small microbatches, and what is recomputed.
    machine = replace(advice.MACHINE, memory_bandwidth=4e9, devices_per_host=4, joined_devices=4, alone=4.0)
    times = measure_layers(config, devices, Cases([Case(tensor, size) for tensor in (1, 2) for size in (1, 8)]))
    estimator = Estimator(survey(config, devices), times, machine, config.batch_size)
    estimates = [estimator.estimate(layout) for layout in layouts]
    estimated = [estimate.seconds for estimate in estimates]
    measured = list(map(min, advice_cores.measure(config, [estimate.layout for estimate in estimates], 6)[0]))
    assert advice.kendall(estimated, measured) > 0.6, (estimated, measured)
    assert advice.regret(estimated, measured) < 0.2, (estimated, measured)
    for name in ("advice", "advice_cores"):
        sys.modules.pop(name)
