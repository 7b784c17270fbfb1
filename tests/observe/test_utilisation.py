"""How many operations a step has, and what share of the devices' peak it uses."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import tiny_recipes

from meshpipe.config import Config
from meshpipe.observe.peak_rates import peak_rates
from meshpipe.observe.utilisation import PeakMemory, Utilisation, model_flops
from meshpipe.runs.build import make_trainer


def device(kind: str, **more: Any) -> Any:
    return SimpleNamespace(**{"device_kind": kind, "process_index": 0, "memory_stats": lambda: None} | more)


def test_operations_of_a_step_are_those_of_its_products() -> None:
    """Four dense layers: forward, a gradient for each weight, and one for each input but the batch."""
    assert products(tiny_recipes.pipeline()) == 4 + 4 + 3


@pytest.mark.parametrize(
    ("trainable", "count"),
    [
        (("layers/1/*",), 4 + 1 + 2),  # the frozen layers 2 and 3 pass the gradient on to it
        (("layers/2/*",), 4 + 1 + 1),
        (("layers/3/*",), 4 + 1 + 0),
    ],
)
def test_no_gradient_counts_that_a_step_does_not_make(trainable: tuple[str, ...], count: int) -> None:
    assert products(dataclasses.replace(tiny_recipes.pipeline(), trainable=trainable)) == count


def products(config: Config) -> float:
    """The operations of a step, in products of 8 x 8 with all 16 examples."""
    trainer = make_trainer(config)
    (count,) = model_flops(trainer.model, trainer.group).values()
    return count / (2 * 16 * 8 * 8)


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA A100-SXM4-40GB", "float32", 156),
        ("NVIDIA L40S", "bfloat16", 362),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
    ],
)
def test_a_device_is_known_by_its_kind(kind: str, dtype: str, teraflops: float) -> None:
    assert peak_rates(device(kind))[dtype] == pytest.approx(teraflops * 1e12)


def test_products_of_each_dtype_are_compared_with_its_peak() -> None:
    """Half a second of bfloat16 and a quarter of float32 at the peak of two devices take 1.5 seconds."""
    flops = {"bfloat16": 2 * 0.5 * 312e12, "float32": 2 * 0.25 * 156e12}
    values = Utilisation(flops, [device("NVIDIA A100-SXM4-80GB")] * 2).of(1.5)
    assert values["model_flops_utilisation"] == pytest.approx(0.5)
    assert values["model_flops_per_s_per_device"] == pytest.approx(sum(flops.values()) / 1.5 / 2)


def test_no_share_is_given_where_the_peak_is_unknown() -> None:
    for kind, flops in (("cpu", {"float32": 1.0}), ("NVIDIA L4", {"float64": 1.0}), ("NVIDIA A100", {})):
        assert "model_flops_utilisation" not in Utilisation(flops, [device(kind)]).of(1.0)


def test_peak_memory_is_of_each_device_or_of_the_host() -> None:
    host = PeakMemory(jax.devices()).values()
    assert 10**8 < host["peak_host_memory_bytes"] < 10**11
    telling = [device("TPU v4", memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 6)]
    other = device("TPU v4", process_index=1)
    devices = [*telling, other]
    assert PeakMemory(devices).values() == {"peak_memory_bytes": [5, 6]}
