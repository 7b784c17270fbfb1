"""A run that needs more memory than there is, is refused before anything is traced or allocated."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_recipes
from tiny_recipes import DenseConfig, PointsConfig

import meshpipe
from meshpipe.choose import capacity
from meshpipe.choose.capacity import least_memory, with_own_activations
from meshpipe.choose.memory import predict_memory
from meshpipe.config import Config
from meshpipe.layers.staged_model import StagedModel
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.reference.verify import verify_recipe
from meshpipe.runs.build import make_chooser, make_trainer


def adam() -> Config:
    return replace(tiny_recipes.pipeline(), model=DenseConfig(depth=4, width=64), data=PointsConfig(width=64))


def predicted(config: Config) -> int:
    """Bytes of all devices."""
    model = make_chooser(config).choose()
    return sum(memory.total for memory in predict_memory(model, config.optimizer.build(config.steps)))


def test_parameters_gradients_and_optimizer_state_are_known_without_a_trace() -> None:
    config = adam()
    model = make_chooser(config).choose()
    transformation = config.optimizer.build(config.steps)
    for found, memory in zip(least_memory(model, transformation), predict_memory(model, transformation), strict=True):
        assert found == {name: getattr(memory, name) for name in ("parameters", "gradients", "optimizer")}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[StagedModel]:
    """The models that were traced."""
    found: list[StagedModel] = []
    trace = StagedModel._trace
    monkeypatch.setattr(StagedModel, "_trace", lambda self, *a, **k: (found.append(self), trace(self, *a, **k))[1])
    return found


def test_a_model_whose_parameters_do_not_fit_is_refused_before_it_is_traced(
    monkeypatch: pytest.MonkeyPatch, traced: list[StagedModel]
) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"which its 2 virtual CPU devices share") as refused:
        make_trainer(adam())
    assert not traced
    message = str(refused.value)
    # 4 layers of 65 * 64 float32, their gradients, and two moments.
    assert "It needs 266 kB or more, and 100 kB are free: 166 kB are missing." in message
    assert "The largest part is optimizer, 133 kB (besides parameters 66.6 kB, gradients 66.6 kB)." in message
    assert "`force` runs it all the same." in message


def test_activations_count_once_it_is_traced(monkeypatch: pytest.MonkeyPatch, traced: list[StagedModel]) -> None:
    config = replace(adam(), batch_size=256, pipeline=PipelineConfig(num_microbatches=2, schedule="gpipe"))
    needed = predicted(config)
    monkeypatch.setattr(capacity, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"1 B are missing. The largest part is activations") as refused:
        make_trainer(config)
    assert traced
    assert "What helps: `remat` layer; a smaller `batch_size`" in str(refused.value)
    monkeypatch.setattr(capacity, "free_memory", lambda: needed)
    make_trainer(config)


def test_a_small_model_costs_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions: list[object] = []
    monkeypatch.setattr(capacity, "predict_memory", lambda *arguments: predictions.append(arguments) or [])
    check = capacity.MemoryCheck(adam().optimizer.build(6))
    model = make_chooser(adam()).choose()
    model.traced = dict(enumerate(model.trace()))
    for free, count in ((1 << 30, 0), (1 << 20, 1)):
        monkeypatch.setattr(capacity, "free_memory", lambda free=free: free)
        check.traced(model)
        assert len(predictions) == count


def test_a_process_counts_the_activations_of_its_own_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    config = adam()
    transformation = config.optimizer.build(config.steps)
    model = make_chooser(config).choose()
    first, second = predict_memory(model, transformation)
    model.traced = {0: model.trace()[0]}
    least = least_memory(model, transformation)
    own, other = with_own_activations(model, least)
    assert 0.6 * first.activations < own["activations"] <= first.activations
    assert other["activations"] < second.activations / 2  # what the first stage sends
    needed = sum(sum(parts.values()) for parts in (own, other))
    monkeypatch.setattr(capacity, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="1 B are missing"):
        capacity.MemoryCheck(transformation).traced(model)


def test_force_and_the_library_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda: 0)
    make_trainer(replace(tiny_recipes.pipeline(), force=True))
    task = tiny_recipes.pipeline().task()
    optimizer = tiny_recipes.pipeline().optimizer.build(6)
    meshpipe.Trainer(task.layers, task.loss, optimizer, batch=task.batch)
    with pytest.raises(ValueError, match="are missing"):
        meshpipe.Trainer(task.layers, task.loss, optimizer, batch=task.batch, check_memory=True)


def test_where_the_free_memory_is_unknown_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda: None)
    make_trainer(tiny_recipes.single())


def test_verify_counts_what_it_compares_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config = adam()
    monkeypatch.setattr(capacity, "free_memory", lambda: 2 * predicted(config))
    with pytest.raises(ValueError, match="The largest part is copies"):
        verify_recipe(config, updates=1)


def test_replicas_can_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(adam(), mesh=meshpipe.MeshConfig(data=2))
    monkeypatch.setattr(capacity, "free_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"What helps: `sharding` fully-sharded;"):
        make_trainer(config)


class Device:
    """A device that says how much memory it has, as accelerators do."""

    platform, id, process_index = "tpu", 3, 0

    def __init__(self, limit: int, used: int) -> None:
        self._stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self) -> dict[str, int]:
        return self._stats


def test_every_accelerator_has_its_own_memory() -> None:
    devices = np.array([[Device(1000, 100)], [Device(1000, 0)]], dtype=object)
    free = {device: capacity._free_on(device) for device in devices.flat}
    first, second = capacity.needs_of_devices(
        devices, [{"parameters": 800}, {"parameters": 1200}], {"copies": 300}, free
    )
    assert (first.total, first.free, first.missing) == (1100, 900, 200)
    assert (second.total, second.free, second.missing) == (1200, 1000, 200)
    assert second.where == "the memory of tpu:3"
    (unknown,) = devices = np.array(jax.devices()[:1])
    assert not list(
        capacity.needs_of_devices(
            devices.reshape(1, 1), [{"parameters": 800}], {}, {unknown: capacity._free_on(unknown)}
        )
    )
