"""Finds the work of a model's layers by tracing them, one at a time and for one and two examples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from meshpipe.advise.candidates import REMATS
from meshpipe.advise.tensor_traffic import TensorTraffic, tensor_traffic
from meshpipe.advise.work import Amount, Kept, LayerWork, ModelWork, ParameterWork, ProgramWork
from meshpipe.choose.chooser import Chooser, split_backwards
from meshpipe.choose.memory import device_bytes, held_always, microbatch_memories, shapes_of
from meshpipe.config import Config
from meshpipe.layers.layer import Layer
from meshpipe.layers.task import Task
from meshpipe.mesh import TENSOR, make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import StageMemory
from meshpipe.sharding import FULLY_SHARDED, PRESETS, Rule
from meshpipe.stage.backward import trace_split
from meshpipe.stage.operations import count_bytes
from meshpipe.stage.products_of_step import count_products
from meshpipe.stage.target import CPU, Target
from meshpipe.stage.temporaries import temporary_bytes
from meshpipe.stage.traced import TracedStage

POLICIES = tuple(name for name in REMATS if name not in ("layer", "full"))
"""The rematerialisations that store residuals; what the others store follows from `none`."""


def survey(config: Config, devices: Sequence[jax.Device], target: Target | None = None) -> ModelWork:
    """The work of the layers of a run, whatever its layout.

    Layers are traced for the kind of the `devices`, of which two suffice, or for the `target`; nothing is compiled or
    run. Raises `ValueError` when the config's model, data or optimizer cannot be had.
    """
    task = config.task()
    one, two = (_Traced(config, task, devices, target, examples=examples) for examples in (1, 2))
    parts = _Traced(config, task, devices, target, tensor=2) if len(devices) > 1 and one.can_split else None
    shapes = one.model.microbatches.shapes
    first = {name: np.asarray(value)[:1] for name, value in task.batch.items()}
    return ModelWork(
        layers=tuple(_layer(place, one, two, parts) for place in range(len(one.model.layers))),
        batch_bytes=0.0 + sum(prod(shape.shape) * shape.dtype.itemsize for shape in shapes.values()),
        tokens=config.model.tokens(first),
        runs_layers_apart=one.model.target.name != CPU.name,
    )


class _Traced:
    """The layers, each a stage of its own, traced for microbatches of so many examples."""

    def __init__(
        self,
        config: Config,
        task: Task,
        devices: Sequence[jax.Device],
        target: Target | None,
        *,
        examples: int = 1,
        tensor: int = 1,
    ) -> None:
        batch = {name: _rows(value, examples) for name, value in task.batch.items()}
        mesh = make_mesh(tensor=tensor, devices=devices)
        transformation = config.optimizer.build(config.steps)
        task = replace(task, batch=batch, rules=PRESETS["replicated"], notes=None)
        chooser = Chooser(task, transformation, mesh=mesh, config=PipelineConfig(), target=target)
        self.model = model = chooser.layer_by_layer(mesh)
        names = {name: (name,) * len(model.layers) for name in POLICIES}
        self.stages: dict[str, list[TracedStage]] = {name: model.trace(of_each) for name, of_each in names.items()}
        plan = split_backwards(model.plan)
        self.memories: dict[str, list[StageMemory]] = {
            name: microbatch_memories(stages, names[name], plan) for name, stages in self.stages.items()
        }
        self.always = held_always(model, transformation, self.stages["none"])
        self._works: dict[int, Mapping[Op, _Counts]] = {}

    @property
    def can_split(self) -> bool:
        """Whether every dim that the tensor axis splits divides by 2."""
        rules = PRESETS["replicated"].rules
        return all(
            leaf.shape[dim] % 2 == 0
            for layer in self.model.layers
            for path, leaf in layer.all_params.items()
            if (dim := _dim(layer.axes.get(path), rules, TENSOR)) is not None
        )

    def counts(self, policy: str, place: int) -> "Mapping[Op, _Counts]":
        stage = self.stages[policy][place]
        if id(stage.closed) not in self._works:
            self._works[id(stage.closed)] = {op: _count(program) for op, program in _programs(stage).items()}
        return self._works[id(stage.closed)]


_Counts = tuple[Mapping[str, float], float, float]
"""Operations of products by dtype, bytes that move, and bytes of temporaries."""


def _count(program: ClosedJaxpr) -> _Counts:
    return count_products(program), count_bytes(program), temporary_bytes(program)


def _programs(stage: TracedStage) -> dict[Op, ClosedJaxpr]:
    if not stage.spec.has_backward:
        return {Op.FORWARD: stage.closed}
    with jax.set_mesh(stage.spec.mesh):
        parts = trace_split(stage, shapes_of(stage.hoisted_vars), shapes_of(stage.residual_vars))
    found = {Op.FORWARD: stage.closed, Op.BACKWARD: parts.closed, Op.BACKWARD_INPUT: parts.input_part()}
    return found if parts.is_whole else {**found, Op.BACKWARD_WEIGHT: parts.weight_part()}


def _layer(place: int, one: _Traced, two: _Traced, parts: _Traced | None) -> LayerWork:
    layer, stage, always = one.model.layers[place], one.stages["none"][place], one.always[place]
    parameters = tuple(_parameters(layer))
    total = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.is_trained)
    traffic = TensorTraffic() if parts is None else tensor_traffic(parts.stages["none"][place])
    return LayerWork(
        kind=layer.class_name,
        programs={policy: _work(one.counts(policy, place), two.counts(policy, place)) for policy in POLICIES},
        parameters=parameters,
        kept={policy: _kept(policy, place, one, parts) for policy in POLICIES},
        output=float(
            device_bytes(leaf for boundary in stage.boundaries_out for leaf in boundary.on(stage.spec.mesh, 1))
        ),
        gradient_bytes=always.gradients / trained if trained else 0.0,
        optimizer_bytes=always.optimizer / trained if trained else 0.0,
        prepared=always.hoisted / total if total else 0.0,
        reduces_forward=traffic.forward,
        reduces_backward=traffic.backward,
        num_reduces=traffic.count,
    )


def _work(one: Mapping[Op, _Counts], two: Mapping[Op, _Counts]) -> dict[Op, ProgramWork]:
    return {
        op: ProgramWork(
            {dtype: Amount.through(count, two[op][0].get(dtype, count)) for dtype, count in operations.items()},
            Amount.through(moved, two[op][1]),
            Amount.through(temporaries, two[op][2]),
        )
        for op, (operations, moved, temporaries) in one.items()
    }


def _kept(policy: str, place: int, one: _Traced, parts: _Traced | None) -> Kept:
    memory = one.memories[policy][place]
    halved = memory if parts is None else parts.memories[policy][place]
    split = min(memory.activation, 2 * max(0.0, memory.activation - halved.activation))
    crossing = memory.kept_for_weights + memory.made_for_weights
    return Kept(float(memory.activation - split), float(split), float(crossing), float(memory.made_for_weights))


def _parameters(layer: Layer) -> list[ParameterWork]:
    return [
        ParameterWork(
            path,
            tuple(leaf.shape),
            leaf.size * leaf.dtype.itemsize,
            over_tensor=_dim(layer.axes.get(path), FULLY_SHARDED.rules, TENSOR),
            over_data=_dim(layer.axes.get(path), FULLY_SHARDED.rules, "data"),
            is_trained=path in layer.params,
        )
        for path, leaf in layer.all_params.items()
    ]


def _dim(axes: Sequence[str | None] | None, rules: Mapping[str, Rule], mesh_axis: str) -> int | None:
    """The dim of a parameter that a mesh axis splits."""
    return next((dim for dim, name in enumerate(axes or ()) if name and rules.get(name, name) == mesh_axis), None)


def _rows(value: Any, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *value.shape[1:]), value.dtype)
