"""Device order, submeshes and what a mesh refuses."""

import os
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from meshpipe.mesh import AXES, MeshConfig, describe, make_mesh, submeshes, use_cpu_devices


def ids(mesh: Mesh) -> list[list[list[int]]]:
    return np.vectorize(lambda device: device.id)(mesh.devices).tolist()


def test_tensor_is_innermost_and_pipeline_outermost() -> None:
    assert ids(make_mesh(2, 2, 2)) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_every_axis_is_auto_and_named() -> None:
    mesh = make_mesh(pipeline=2, tensor=2)
    assert mesh.axis_names == AXES == ("pipeline", "data", "tensor")
    assert mesh.shape == {"pipeline": 2, "data": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_a_smaller_mesh_takes_the_first_devices() -> None:
    assert ids(make_mesh(3)) == [[[0]], [[1]], [[2]]]


def test_devices_are_taken_in_the_order_they_are_given() -> None:
    devices = [jax.devices()[i] for i in (5, 1, 7, 3)]
    assert ids(make_mesh(2, 2, devices=devices)) == [[[5], [1]], [[7], [3]]]


def test_submeshes_are_the_rows_of_the_pipeline_axis() -> None:
    rows = submeshes(make_mesh(2, 2, 2))
    assert [ids(row) for row in rows] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    for row in rows:
        assert row.axis_names == ("data", "tensor")
        assert row.axis_types == (AxisType.Auto,) * 2


def test_submeshes_keep_further_axes() -> None:
    devices = np.asarray(jax.devices()[:8]).reshape(2, 1, 2, 2)
    mesh = Mesh(devices, ("pipeline", "data", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
    assert [row.axis_names for row in submeshes(mesh)] == [("data", "context", "tensor")] * 2


def test_submeshes_want_the_pipeline_axis_first() -> None:
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(1, 2), ("data", "pipeline"))
    with pytest.raises(ValueError, match=r"first mesh axis must be 'pipeline'.*'data', 'pipeline'.*make_mesh"):
        submeshes(mesh)


def test_a_mesh_as_jax_makes_it_is_refused_with_the_way_out() -> None:
    mesh = jax.make_mesh((2, 2), ("pipeline", "data"))
    with pytest.raises(ValueError, match=r"Got pipeline Explicit, data Explicit.*AxisType.Auto,\) \* 2"):
        submeshes(mesh)
    auto = jax.make_mesh((2, 2), ("pipeline", "data"), axis_types=(AxisType.Auto,) * 2)
    assert len(submeshes(auto)) == 2


def test_too_few_devices_says_the_product_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"Got 4 \* 2 \* 2 = 16, with 8 cpu device.*use_cpu_devices\(16\)"):
        make_mesh(4, 2, 2)


@pytest.mark.parametrize("axis", AXES)
def test_sizes_below_one_are_refused(axis: str) -> None:
    with pytest.raises(ValueError, match=rf"`{axis}` must be at least 1. Got 0"):
        MeshConfig(**{axis: 0})
    with pytest.raises(ValueError, match=rf"`{axis}` must be at least 1. Got -2"):
        make_mesh(**{axis: -2})


def test_the_config_counts_devices() -> None:
    assert MeshConfig(pipeline=4, data=3, tensor=2).num_devices == 24


def test_virtual_devices_cannot_grow_once_jax_has_started() -> None:
    started = len(jax.devices())
    with pytest.raises(ValueError, match=rf"Got {started + 1}, with {started} started.*before anything else"):
        use_cpu_devices(started + 1)


def test_asking_for_devices_that_are_there_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "16")
    use_cpu_devices(2)
    assert len(jax.devices()) == 8
    assert os.environ["NPROC"] == "16"


def test_describe_says_the_sizes_in_words() -> None:
    assert describe(make_mesh(2, 1, 2)) == "pipeline 2 x data 1 x tensor 2 = 4 cpu devices"
    assert describe(make_mesh()) == "pipeline 1 x data 1 x tensor 1 = 1 cpu device"


@pytest.mark.parametrize(("kernel", "advice"), [(True, "Restart the kernel. Call"), (False, "Restart IPython. Call")])
def test_in_a_notebook_a_late_call_is_told_to_restart(
    kernel: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = SimpleNamespace(kernel=None) if kernel else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for late in (lambda: use_cpu_devices(64), lambda: make_mesh(64)):
        with pytest.raises(ValueError, match=rf"{advice} meshpipe\.use_cpu_devices"):
            late()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with pytest.raises(ValueError, match=r"with 8 started\. Call meshpipe"):
        use_cpu_devices(64)
