"""Measures on the devices of one rank what every layer costs."""

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.choose.layer_run import LayerRun, filled
from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import DATA, TENSOR
from meshpipe.phases import each, phase
from meshpipe.plan.graph import Value
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting
from meshpipe.plan.plan import Op
from meshpipe.sharding import Arrays, Shapes, abstract, replicated
from meshpipe.stage.backward import trace_backward
from meshpipe.stage.operations import count_operations
from meshpipe.stage.programs import StagePrograms, compile_stage
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
    rows = {name: np.asarray(filled(value)) for name, value in batch.items()}
    inputs = model.inputs(rows, model.place_seed(0), 0)
    graph = model.plan.graph
    measured: dict[str, tuple[LayerCosts, tuple[Arrays, ...]]] = {}
    made: dict[Value, Arrays] = {}
    what = f"Measuring on {model.mesh.devices.flat[0].platform}{expected},"
    for index, (key, stage) in enumerate(each(what, "layer", list(zip(keys, traced, strict=True)))):
        if key not in measured:
            run = LayerRun(stage, programs[key], inputs[index], [made[value] for value in graph.inputs(index)])
            measured[key] = _measured(run, model.layers[index].class_name, next_rank), run.values
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


def _measured(run: LayerRun, kind: str, next_rank: Mesh | None) -> LayerCosts:
    calls = run.calls()
    times = dict(zip(calls, _seconds(*calls.values()), strict=True))
    of_input, of_weights = (times.get(op, 0.0) for op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT))
    move = None if next_rank is None else run.transfer_to(next_rank)
    return LayerCosts(
        kind=kind,
        forward=times[Op.FORWARD],
        # The parts do the same work: a whole that took longer met noise.
        backward=min(times.get(Op.BACKWARD, 0.0), of_input + of_weights),
        backward_input=of_input,
        backward_weight=of_weights,
        transfer=0.0 if move is None else _seconds(move)[0],
        parameter_bytes=run.parameter_bytes,
        activation_bytes=run.activation_bytes,
    )


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
