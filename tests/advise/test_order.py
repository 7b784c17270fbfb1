"""The order of layouts by estimate is that by measurement."""

import shutil
import sys
from pathlib import Path

import pytest

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
