"""Measures on the devices of one rank what every layer costs."""

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import DATA, TENSOR
from meshpipe.pipeline.transfer import transfer_to
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting
from meshpipe.plan.plan import Op
from meshpipe.sharding import Arrays, Shapes, abstract, replicated, scalar_dtype
from meshpipe.stage.operations import count_operations
from meshpipe.stage.programs import StagePrograms, compile_stage
from meshpipe.stage.traced import TracedStage

LEAST_CALLS, MOST_CALLS = 5, 50
LEAST_SECONDS = 0.5
"""Programs are called 5 times, and more often, up to 50 times, while that takes less than this."""


def profile_layers(model: StagedModel, batch: Mapping[str, Any], next_rank: Mesh | None = None) -> ModelCosts:
    """The costs of every layer of a model whose stages are one layer each, all on one rank.

    Each layer is compiled as the stage that it is, and run on the output of the layer before it. Its programs take
    turns, as in a step, and the time of each is the median of several calls after a first one. Layers whose programs
    are the same are measured once. `batch` is a global batch, arrays or shapes; `next_rank` has the devices to which
    outputs are moved, None moves nothing.
    """
    started = time.perf_counter()
    traced = model.trace()
    model.traced = dict(enumerate(traced))
    keys = [_key(stage) for stage in traced]
    distinct = dict(zip(keys[::-1], traced[::-1], strict=True))  # the first of each
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda stage: compile_stage(stage, set(Op), remat=model.config.remat), distinct.values())
        programs = dict(zip(distinct, compiled, strict=True))
    rows = {name: np.asarray(_filled(value)) for name, value in batch.items()}
    inputs = model.inputs(rows, model.place_seed(0), 0)
    measured: dict[str, tuple[LayerCosts, Arrays]] = {}
    x: Arrays = ()
    for index, (key, stage) in enumerate(zip(keys, traced, strict=True)):
        if key not in measured:
            run = _Run(stage, programs[key], x, inputs[index])
            measured[key] = run.measure(model.layers[index].class_name, next_rank), run.output
        x = measured[key][1]
    device = jax.tree.leaves(model.mesh.devices.tolist())[0]
    return ModelCosts(
        tuple(measured[key][0] for key in keys),
        setting_of(model),
        device.platform if device.device_kind.lower() == device.platform else f"{device.platform} {device.device_kind}",
        time.perf_counter() - started,
    )


def setting_of(model: StagedModel) -> Setting:
    """What the costs of this model's layers depend on."""
    sizes = model.mesh.shape
    size = next(iter(model.microbatches.shapes.values())).shape[0] // model.config.num_microbatches
    return Setting(size, sizes.get(DATA, 1), sizes.get(TENSOR, 1), model.config.remat)


def operations_of_layers(model: StagedModel) -> list[float]:
    """Floating-point operations of each stage on one microbatch, forward and backward; counted without running any."""
    return [count_operations(stage.closed) + count_operations(_backward(stage)) for stage in model.trace()]


def _backward(stage: TracedStage) -> Any:
    """Backward of a stage, traced on its own."""
    shapes: Callable[[Any], Shapes] = lambda values: tuple(  # noqa: E731
        abstract(v.aval.shape, v.aval.dtype, replicated(stage.spec.mesh)) for v in values
    )
    kept = tuple(stage.x[i] for i in stage.kept_x), tuple(stage.state[i] for i in stage.kept_state)
    boundary = stage.boundary_out
    seeds = (
        (jax.ShapeDtypeStruct((), scalar_dtype()),)
        if boundary is None
        else boundary.gradients_on(stage.spec.mesh, stage.microbatch_size)
    )
    arguments = (stage.params, shapes(stage.hoisted_vars), stage.inputs, stage.microbatch, kept)
    with jax.set_mesh(stage.spec.mesh):
        return jax.make_jaxpr(stage.pull_back)(*arguments, shapes(stage.residual_vars), seeds)


def _key(stage: TracedStage) -> str:
    """The same for stages of the same programs, whatever hashes their random streams begin with."""
    program = re.sub(r"\b\d+:u32\[\]", "_:u32[]", str(stage.closed))
    shardings = [
        shape.sharding.spec for shape in (*stage.params, *stage.fixed_state, *stage.state, *stage.x, *stage.inputs)
    ]
    return f"{program}\n{shardings}\n{stage.input_names}\n{stage.spec.is_last}"


class _Run:
    """The programs of one stage on values of about the size that they have at the start of training."""

    def __init__(self, stage: TracedStage, programs: StagePrograms, x: Arrays, inputs: Arrays):
        self.stage, self.programs, self.x, self.inputs = stage, programs, x, inputs
        self.params, self.state, fixed = _place(stage.params), _place(stage.state), _place(stage.fixed_state)
        self.microbatch = jax.device_put(np.uint32(0), stage.microbatch.sharding)
        self.hoisted = programs.hoisted(self.params, fixed)
        self.accumulators, self.totals = programs.zeros()
        self._forward()
        self.kept = tuple(x[i] for i in stage.kept_x), tuple(self.state[i] for i in stage.kept_state)
        from_forward = (*self.kept[0], *self.kept[1], *self.residuals)
        self.activation_bytes = _device_bytes(from_forward if programs.recompute is None else (*x, *self.state))
        boundary = stage.boundary_out
        self.gradients = () if boundary is None else tuple(self.output[i] for i in boundary.differentiable)

    def measure(self, kind: str, next_rank: Mesh | None) -> LayerCosts:
        split = self.programs.split
        assert self.programs.backward is not None
        assert split is not None
        calls = [self._forward, lambda: self._back(self.programs.backward), self._back_input]
        if split.weight is not None:
            calls.append(self._weight)
        forward, backward, *parts = _seconds(*calls)
        return LayerCosts(
            kind=kind,
            forward=forward,
            backward=min(backward, sum(parts)),  # which do the same work: a whole that took longer met noise
            backward_input=parts[0],
            backward_weight=sum(parts[1:], 0.0),
            transfer=0.0 if next_rank is None else self._transfer(next_rank),
            parameter_bytes=_device_bytes(self.params),
            activation_bytes=self.activation_bytes,
        )

    def _forward(self) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        assert self.programs.forward is not None
        results = self.programs.forward(
            self.params, self.hoisted, self.state, self.x, self.inputs, self.microbatch, self.totals
        )
        self.output, _, self.residuals, self.totals = results
        return results

    def _again(self) -> Arrays:
        """What forward handed over, or what a second forward computes where it hands nothing over."""
        recompute = self.programs.recompute
        if recompute is None:
            return self.residuals
        return recompute(self.params, self.hoisted, self.state, self.x, self.inputs, self.microbatch)

    def _back(self, run: Any) -> Any:
        self.read = self._again()
        results = run(
            self.accumulators,
            self.params,
            self.hoisted,
            self.inputs,
            self.microbatch,
            self.kept,
            self.read,
            self.gradients,
        )
        self.accumulators = results[0]
        return results

    def _back_input(self) -> Any:
        assert self.programs.split is not None
        results = self._back(self.programs.split.input)
        self.crossing = results[2]
        return results

    def _weight(self) -> Arrays:
        """On what the last `_back_input` read and handed over."""
        assert self.programs.split is not None
        assert self.programs.split.weight is not None
        of_microbatch = (*self.kept[0], *self.kept[1], *self.read, *self.gradients)
        carried = tuple(of_microbatch[i] for i in self.programs.split.carried)
        self.accumulators = self.programs.split.weight(
            self.accumulators, self.params, self.hoisted, self.inputs, self.microbatch, carried, self.crossing
        )
        return self.accumulators

    def _transfer(self, mesh: Mesh) -> float:
        boundary = self.stage.boundary_out
        if boundary is None:
            return 0.0
        move = transfer_to(tuple(shape.sharding for shape in boundary.on(mesh, self.stage.microbatch_size)))
        (seconds,) = _seconds(lambda: move(self.output))
        return seconds


def _seconds(*calls: Callable[[], Any]) -> list[float]:
    """The median time of each call until its results are there; calls take turns, and the first turn does not count."""
    turns: list[list[float]] = []
    began = math.inf
    while len(turns) <= LEAST_CALLS or (time.perf_counter() - began < LEAST_SECONDS and len(turns) <= MOST_CALLS):
        turns.append([_time(call) for call in calls])
        began = min(began, time.perf_counter())
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def _time(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def _place(shapes: Shapes) -> Arrays:
    return tuple(jax.device_put([_filled(shape) for shape in shapes], [shape.sharding for shape in shapes]))


def _filled(value: Any) -> Any:
    """Arrays as they are; a shape with numbers that keep sums of products of size 1: programs may be slow on others."""
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if not jax.dtypes.issubdtype(value.dtype, np.inexact):
        return np.zeros(value.shape, value.dtype)
    if len(value.shape) < 2:
        return np.ones(value.shape, value.dtype)
    scale = 1 / np.sqrt(np.prod(value.shape[:-1]))
    block = np.random.default_rng(0).normal(scale=scale, size=2**16).astype(value.dtype)
    return np.resize(block, value.shape)


def _device_bytes(arrays: Arrays) -> int:
    """What one device holds of them."""
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)
