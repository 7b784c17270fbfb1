"""Costs of layers counted in their traced programs, where measuring them is impossible or says nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.extend.core import ClosedJaxpr

from meshpipe.choose.memory import device_bytes, shapes_of
from meshpipe.choose.profile import layer_key, setting_of
from meshpipe.layers.staged_model import StagedModel
from meshpipe.machine import format_bytes, free_memory, usable_cores
from meshpipe.mesh import on_cpu
from meshpipe.phases import each
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts
from meshpipe.stage.backward import trace_split
from meshpipe.stage.jaxpr import nbytes
from meshpipe.stage.operations import count_bytes, count_operations
from meshpipe.stage.spec import on_submesh
from meshpipe.stage.traced import TracedStage


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, roughly: costs are compared with each other, and one unit is as good as another.

    An operation takes the longer of its arithmetic and its memory traffic.
    """

    operations: float
    memory: float
    """Bytes per second between a device and its memory."""
    link: float
    """Bytes per second between two devices."""

    def seconds(self, program: ClosedJaxpr, devices: int) -> float:
        operations, moved = count_operations(program), count_bytes(program)
        return max(operations / self.operations, moved / self.memory) / devices

    def describe(self) -> str:
        return f"{self.operations / 1e12:g} TFLOP/s and {format_bytes(self.memory)}/s of memory a device"


ACCELERATOR = Speed(operations=2e14, memory=2e12, link=5e10)
"""About half of what the data sheets of today's accelerators say for bfloat16."""
CORE = 2e10
"""Floating-point operations that a core does in a second, roughly."""
CALLS = 6
"""How often measuring calls each program at least."""
MAX_SECONDS = 600.0
"""Layers that take longer to measure by estimate are counted instead."""


def why_not_measured(model: StagedModel, stages: Sequence[TracedStage], seconds: float) -> str | None:
    """Why the layers of a model, traced, cannot be measured here, one after the other; None if they can.

    `seconds` is what that is expected to take.
    """
    free = free_memory() if on_cpu(model.mesh) else None
    needed = max(map(_bytes_to_measure, stages)) * model.mesh.devices.size
    if free is not None and needed > free:
        return f"to measure its largest layer takes {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    if seconds > MAX_SECONDS:
        return f"to measure them on {model.mesh.devices.flat[0].platform} takes about {seconds / 60:.0f} minutes"
    return None


def seconds_to_measure(model: StagedModel, stages: Sequence[TracedStage]) -> float:
    """A rough estimate, without the time to compile."""
    distinct = {layer_key(stage): stage for stage in stages}
    rate = CORE * usable_cores() if on_cpu(model.mesh) else ACCELERATOR.operations * model.mesh.devices.size
    operations = [count_operations(p) for stage in distinct.values() for p in _programs(stage)]
    return CALLS * sum(operations) / rate


def count_layers(model: StagedModel, stages: Sequence[TracedStage], why: str, *, moves: bool) -> ModelCosts:
    """The costs of every layer of a model whose stages are one layer each, by the operations and bytes of its programs.

    `why` says why they are not measured, and `moves` whether outputs move to another rank.
    """
    started = time.perf_counter()
    found: dict[str, LayerCosts] = {}
    costs = []
    for stage in each("Counting the costs of", "layer", stages):
        key = layer_key(stage)
        if key not in found:
            kind = model.layers[stage.spec.index].class_name
            found[key] = _count(stage, kind, model, moves=moves)
        costs.append(found[key])
    seconds = time.perf_counter() - started
    return ModelCosts(tuple(costs), setting_of(model), f"counted at {ACCELERATOR.describe()}", seconds, counted=why)


def _count(stage: TracedStage, kind: str, model: StagedModel, *, moves: bool) -> LayerCosts:
    devices = model.mesh.devices.size
    forward, *backward = (ACCELERATOR.seconds(p, devices) for p in _programs(stage))
    whole, of_input, *of_weights = backward or (0.0, 0.0)
    given = on_submesh(stage.boundaries_out, stage.spec.mesh, stage.microbatch_size)
    again = forward if model.config.remat == "full" and backward else 0.0
    return LayerCosts(
        kind=kind,
        forward=forward,
        backward=again + whole,
        backward_input=again + of_input,
        backward_weight=sum(of_weights, 0.0),
        transfer=device_bytes(given) / ACCELERATOR.link if moves else 0.0,
        parameter_bytes=device_bytes(stage.params),
        activation_bytes=nbytes(stage.residual_vars) // devices,
    )


def _programs(stage: TracedStage) -> list[ClosedJaxpr]:
    """Forward, backward, and backward in two parts, or in one where it cannot be split; forward alone where there is no
    backward.
    """
    if not stage.spec.has_backward:
        return [stage.closed]
    with jax.set_mesh(stage.spec.mesh):
        parts = trace_split(stage, shapes_of(stage.hoisted_vars), shapes_of(stage.residual_vars))
    split = [parts.input_part()] if parts.is_whole else [parts.input_part(), parts.weight_part()]
    return [stage.closed, parts.closed, *split]


def _bytes_to_measure(stage: TracedStage) -> int:
    """On each device: parameters, their gradients, and what one microbatch keeps."""
    residuals = nbytes(stage.residual_vars) // stage.spec.mesh.devices.size
    return 2 * device_bytes(stage.params) + device_bytes(stage.x) + device_bytes(stage.inputs) + residuals
