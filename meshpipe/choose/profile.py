"""Measures on the devices of one rank what every layer costs."""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import DATA, TENSOR
from meshpipe.phases import each, phase
from meshpipe.pipeline.transfer import transfer_to
from meshpipe.plan.graph import Value
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting
from meshpipe.plan.plan import Op
from meshpipe.sharding import Arrays, Shapes, abstract, replicated
from meshpipe.stage.backward import trace_backward
from meshpipe.stage.calls import Call, Slots, StageCalls, StageSlots
from meshpipe.stage.operations import count_operations
from meshpipe.stage.programs import StagePrograms, compile_stage
from meshpipe.stage.spec import on_submesh
from meshpipe.stage.traced import TracedStage

MIN_CALLS, MAX_CALLS = 5, 50
MIN_SECONDS = 0.5
"""Programs are called 5 times, and more often, up to 50 times, while that takes less than this."""


def profile_layers(
    model: StagedModel,
    batch: Mapping[str, Any],
    next_rank: Mesh | None = None,
    traced: Sequence[TracedStage] | None = None,
    about: float | None = None,
) -> ModelCosts:
    """The costs of every layer of a model whose stages are one layer each, all on one rank.

    Each layer is compiled as the stage that it is, and run on the outputs that it reads. Its programs take turns, as in
    a step, and the time of each is the median of several calls after a first one. Layers whose programs
    are the same are measured once. `batch` is a global batch, arrays or shapes; `next_rank` has the devices to which
    outputs are moved, None moves nothing. `traced` has the stages if they are traced already, and `about` the seconds
    that measuring is expected to take.
    """
    started = time.perf_counter()
    traced = model.trace() if traced is None else traced
    model.traced = dict(enumerate(traced))
    keys = [layer_key(stage) for stage in traced]
    distinct = dict(zip(keys[::-1], traced[::-1], strict=True))  # the first of each
    expected = "" if about is None else f" (about {max(1.0, about):.0f} s)"
    programs = _compile(distinct, model.config.remat)
    rows = {name: np.asarray(_filled(value)) for name, value in batch.items()}
    inputs = model.inputs(rows, model.place_seed(0), 0)
    graph = model.plan.graph
    measured: dict[str, tuple[LayerCosts, tuple[Arrays, ...]]] = {}
    made: dict[Value, Arrays] = {}
    what = f"Measuring on {model.mesh.devices.flat[0].platform}{expected},"
    for index, (key, stage) in enumerate(each(what, "layer", list(zip(keys, traced, strict=True)))):
        if key not in measured:
            run = _Run(stage, programs[key], [made[value] for value in graph.inputs(index)], inputs[index])
            measured[key] = run.measure(model.layers[index].class_name, next_rank), run.values
        made.update(zip(graph.outputs(index), measured[key][1], strict=True))
    device = jax.tree.leaves(model.mesh.devices.tolist())[0]
    return ModelCosts(
        tuple(measured[key][0] for key in keys),
        setting_of(model),
        device.platform if device.device_kind.lower() == device.platform else f"{device.platform} {device.device_kind}",
        time.perf_counter() - started,
    )


def _compile(stages: Mapping[str, TracedStage], remat: str) -> dict[str, StagePrograms]:
    with phase("Compiling the layers,", "kind of layer", len(stages)) as compiling, ThreadPoolExecutor() as pool:

        def build(stage: TracedStage) -> StagePrograms:
            programs = compile_stage(stage, set(Op), remat=remat)
            compiling.next()
            return programs

        return dict(zip(stages, pool.map(build, stages.values()), strict=True))


def setting_of(model: StagedModel) -> Setting:
    """What the costs of this model's layers depend on."""
    sizes = model.mesh.shape
    size = next(iter(model.microbatches.shapes.values())).shape[0] // model.config.num_microbatches
    return Setting(size, sizes.get(DATA, 1), sizes.get(TENSOR, 1), model.config.remat)


def operations_of_layers(model: StagedModel) -> list[float]:
    """Floating-point operations of each stage on one microbatch, forward and backward; counted without running any."""
    return [count_operations(stage.closed) + _backward_operations(stage) for stage in model.trace()]


def _backward_operations(stage: TracedStage) -> float:
    """Of the backward of a stage, traced on its own."""
    if not stage.spec.has_backward:
        return 0.0
    shapes: Callable[[Sequence[Any]], Shapes] = lambda values: tuple(  # noqa: E731
        abstract(v.aval.shape, v.aval.dtype, replicated(stage.spec.mesh)) for v in values
    )
    with jax.set_mesh(stage.spec.mesh):
        return count_operations(trace_backward(stage, shapes(stage.hoisted_vars), shapes(stage.residual_vars)))


def layer_key(stage: TracedStage) -> str:
    """The same for stages of the same programs, whatever hashes their random streams begin with."""
    program = re.sub(r"\b\d+:u32\[\]", "_:u32[]", str(stage.closed))
    shardings = [
        shape.sharding.spec for shape in (*stage.params, *stage.fixed_state, *stage.state, *stage.x, *stage.inputs)
    ]
    gradients = stage.spec.has_backward, stage.spec.gradients_in, stage.spec.readers
    return f"{program}\n{shardings}\n{stage.input_names}\n{stage.sum_names}\n{gradients}"


_STEP = StageSlots(params=0, hoisted=1, state=2, inputs=3, accumulators=4, totals=5)
_RESIDUALS, _FOR_WEIGHTS = 6, 7
"""Slots of a microbatch. Those of values and their gradients follow."""


class _Run:
    """The programs of one stage on values of about the size that they have at the start of training."""

    def __init__(self, stage: TracedStage, programs: StagePrograms, x: Sequence[Arrays], inputs: Arrays):
        self._stage = stage
        self._calls = StageCalls(stage, programs, _STEP)
        self._slots: Slots = [None] * (_FOR_WEIGHTS + 1)
        self._calls.begin(self._slots, _place(stage.params), _place(tuple(stage.spec.state.values())), inputs)
        self._microbatch = jax.device_put(np.uint32(0), stage.microbatch.sharding)
        self._outputs = self._new_slots([()] * len(stage.boundaries_out))
        residuals = _RESIDUALS if stage.spec.has_backward else None
        self._forward = self._calls.forward(
            self._microbatch, x=self._new_slots(x), outputs=self._outputs, residuals=residuals
        )
        self._forward(self._slots)
        self.values: tuple[Arrays, ...] = tuple(self._slots[index] for index in self._outputs)
        """What it hands on."""
        self._activation_bytes = _device_bytes(jax.tree.leaves(self._slots[_RESIDUALS]))

    def measure(self, kind: str, next_rank: Mesh | None) -> LayerCosts:
        timed = [self._waited_for(self._forward, *self._outputs, _STEP.state, _RESIDUALS, _STEP.totals)]
        if self._stage.spec.has_backward:
            timed += self._backwards()
        forward, *backwards = _seconds(*timed)
        backward, *parts = backwards or (0.0, 0.0)
        return LayerCosts(
            kind=kind,
            forward=forward,
            backward=min(backward, sum(parts)),  # which do the same work: a whole that took longer met noise
            backward_input=parts[0],
            backward_weight=sum(parts[1:], 0.0),
            transfer=0.0 if next_rank is None else self._transfer(next_rank),
            parameter_bytes=_device_bytes(self._slots[_STEP.params]),
            activation_bytes=self._activation_bytes,
        )

    def _backwards(self) -> list[Callable[[], Any]]:
        """Backward, and its parts."""
        calls, microbatch = self._calls, self._microbatch
        outputs = zip(self._stage.boundaries_out, self._stage.spec.readers, self.values, strict=True)
        # Gradients have the shapes of the values, and the values have numbers of a likely size.
        seeds = [tuple(leaves[i] for i in b.differentiable) for b, readers, leaves in outputs for _ in range(readers)]
        given, found = self._new_slots(seeds), self._new_slots([()] * len(self._stage.x_gradients))
        whole = calls.backward(microbatch, residuals=_RESIDUALS, output_gradients=given, x_gradients=found)
        of_input = calls.backward_input(
            microbatch, residuals=_RESIDUALS, output_gradients=given, x_gradients=found, for_weights=_FOR_WEIGHTS
        )
        timed = [
            self._waited_for(whole, _STEP.accumulators, *found),
            self._waited_for(of_input, _STEP.accumulators, *found, _FOR_WEIGHTS),
        ]
        if calls.weight_gradients_apart:
            of_weights = calls.backward_weight(microbatch, for_weights=_FOR_WEIGHTS)
            timed.append(self._waited_for(of_weights, _STEP.accumulators))
        return timed

    def _new_slots(self, values: Sequence[Arrays]) -> list[int]:
        first = len(self._slots)
        self._slots += values
        return list(range(first, len(self._slots)))

    def _waited_for(self, call: Call, *results: int) -> Callable[[], Any]:
        """The call, with the values of the slots that it leaves its results in."""

        def run() -> Any:
            call(self._slots)
            return [self._slots[index] for index in results]

        return run

    def _transfer(self, mesh: Mesh) -> float:
        stage = self._stage
        if not stage.boundaries_out:
            return 0.0
        shapes = on_submesh(stage.boundaries_out, mesh, stage.microbatch_size)
        move = transfer_to(tuple(shape.sharding for shape in shapes))
        arrays = tuple(leaf for leaves in self.values for leaf in leaves)
        (seconds,) = _seconds(lambda: move(arrays))
        return seconds


def _seconds(*calls: Callable[[], Any]) -> list[float]:
    """The median time of each call until its results are there; calls take turns, and the first turn does not count."""
    turns: list[list[float]] = []
    began = math.inf
    while len(turns) <= MIN_CALLS or (time.perf_counter() - began < MIN_SECONDS and len(turns) <= MAX_CALLS):
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


def _device_bytes(arrays: Iterable[jax.Array]) -> int:
    """What one device holds of them."""
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)
