"""Predicts what a step holds in the memory of each rank's devices, from shapes, or with what XLA compiled."""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Var

from meshpipe.choose.compiled_memory import ProgramsOfStage, leaf_bytes, programs_of_stages, with_compiled
from meshpipe.choose.compiled_memory import device_bytes as device_bytes
from meshpipe.compiled.program import CompiledProgram
from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import DATA, TENSOR
from meshpipe.optimizer.separable import kinds_of_updates
from meshpipe.optimizer.state import state_shapes
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.simulate import Costs, StageMemory, Timeline, simulate
from meshpipe.sharding import abstract
from meshpipe.stage.backward import trace_pullback, trace_split
from meshpipe.stage.jaxpr import nbytes
from meshpipe.stage.recomputed import recomputed_bytes
from meshpipe.stage.traced import TracedStage

ONE_UNIT_EACH = Costs(dict.fromkeys(Op, 1.0))
"""The order in which the executor dispatches actions, and thereby allocates memory, as times."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes per device of a rank, at the peak of a step."""

    rank: int
    parameters: int
    """Parameters, trained or not, and what is computed from them once per step, such as a bfloat16 copy."""
    gradients: int
    optimizer: int
    batch: int
    """The batch fields that its stages read, and state. State that forward does not change, such as a mask, counts
    once; state that it changes, such as batch statistics, counts twice."""
    activations: int
    """What forward stores for backward, over all microbatches that are live at once, and boundary values in transit."""
    temporaries: int
    """What the inside of a program, and an update, add to that at the peak. Where the programs are compiled, what XLA
    says; else an estimate, of what rematerialisation recomputes inside a backward alone."""
    live_activations: int
    """Microbatches that are live at once, summed over the stages of the rank."""
    transfers: int = 0
    """The part of `activations` that is on its way between stages."""
    peak_in: str = ""
    """What runs at the peak: an action such as `0B1`, or `update of stage 1`; empty where nothing does."""

    @property
    def parts(self) -> dict[str, int]:
        """What the total is the sum of, by name."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "batch": self.batch,
            "residuals": self.activations - self.transfers,
            "transfers": self.transfers,
            "temporaries": self.temporaries,
        }

    @property
    def arrays(self) -> int:
        """Without what is inside of programs."""
        return self.parameters + self.gradients + self.optimizer + self.batch + self.activations

    @property
    def total(self) -> int:
        return self.arrays + self.temporaries


@dataclass(frozen=True)
class HeldAlways:
    """Bytes per device that a stage holds for the whole step."""

    parameters: int
    hoisted: int
    """What is computed from parameters and fixed state once per step."""
    gradients: int
    optimizer: int
    inputs: int
    """The batch fields that it reads."""
    state: int

    @property
    def total(self) -> int:
        return self.parameters + self.hoisted + self.gradients + self.optimizer + self.inputs + self.state


def predict_memory(
    model: StagedModel,
    transformation: optax.GradientTransformation,
    traced: Sequence[TracedStage] | None = None,
    programs: Sequence[CompiledProgram] = (),
) -> list[RankMemory]:
    """The memory of every rank, found by tracing the model, unless it was `traced` already; nothing is allocated.

    With the compiled `programs` of a step, memory that XLA decides on is what XLA says: temporary memory, and what
    residuals take in the layout that it chose. Without, temporary memory is estimated for what rematerialisation
    recomputes, the rest is not included, and for layouts see `stage_memory`.
    """
    plan, remat = model.plan, _remat(model)
    traced = model.trace(remat) if traced is None else traced
    of_stage = programs_of_stages(programs)
    always = [
        _compiled_always(kept, of_stage.get(s, {})) for s, kept in enumerate(held_always(model, transformation, traced))
    ]
    memory = _stage_memory(model, remat, always, traced)
    memory = [
        with_compiled(held, stage, of_stage.get(s, {}))
        for s, (held, stage) in enumerate(zip(memory, traced, strict=True))
    ]
    timeline = simulate(plan, ONE_UNIT_EACH, memory, model.late)
    arrays = replace(timeline, memory=[replace(stage, temporaries={}) for stage in memory])
    staying = [replace(stage, inputs=(), kept_inputs=(), input_gradients=()) for stage in arrays.memory]
    without_transfers = replace(timeline, memory=staying).peak_bytes
    ranks = []
    for rank, peak in enumerate(arrays.peak_bytes):
        kept = {stage: always[stage] for stage in plan.stages_of(rank)}
        most, peak_in = _highest(timeline, rank)
        for name, size in _outside_of_actions(kept, of_stage):
            if size > most:
                most, peak_in = size, name
        ranks.append(
            RankMemory(
                rank=rank,
                parameters=sum(stage.parameters + stage.hoisted for stage in kept.values()),
                gradients=sum(stage.gradients for stage in kept.values()),
                optimizer=sum(stage.optimizer for stage in kept.values()),
                batch=sum(stage.inputs + stage.state for stage in kept.values()),
                activations=round(peak) - sum(stage.total for stage in kept.values()),
                temporaries=round(most) - round(peak),
                transfers=max(0, round(peak) - round(without_transfers[rank])),
                live_activations=timeline.peak_activations[rank],
                peak_in=peak_in,
            )
        )
    return ranks


def _highest(timeline: Timeline, rank: int) -> tuple[float, str]:
    """The peak of a rank over its actions, and the action that runs then."""
    time, most = max(timeline.memory_curve(rank), key=lambda point: point[1])
    starts, ends = timeline.starts, timeline.ends
    running = (action for action in timeline.plan.orders[rank] if starts[action] <= time < ends[action])
    return most, str(next(running, ""))


def _outside_of_actions(
    kept: Mapping[int, HeldAlways], programs: Mapping[int, ProgramsOfStage]
) -> Iterator[tuple[str, int]]:
    """What a rank holds while programs run that are no actions: before the first one, and after the last one."""
    total = sum(stage.total for stage in kept.values())
    # Of the step only gradients and state are left when the optimizer updates.
    left = total - sum(stage.hoisted + stage.inputs for stage in kept.values())
    for s, stage in kept.items():
        of_stage = programs.get(s, {})
        if (reduce := of_stage.get("reduce")) is not None:
            yield f"reduce of stage {s}", total + reduce.needs
            left += reduce.outputs - stage.gradients
    for s, stage in kept.items():
        of_stage = programs.get(s, {})
        if (prepare := of_stage.get("prepare")) is not None:
            yield f"prepare of stage {s}", total - stage.gradients + prepare.temporaries
        for name in ("norm", "update"):
            if name in of_stage:
                yield f"{name} of stage {s}", left + of_stage[name].needs


def stage_memory(model: StagedModel, transformation: optax.GradientTransformation) -> list[StageMemory]:
    """What every stage stores on each device of its rank, found by tracing the model; nothing is allocated or compiled.

    Parameters, gradients, optimizer state, batch and boundary values are exact, and on submeshes of one device
    everything is, but for what is recomputed inside of a program. On several devices, XLA chooses the layout of
    residuals: they are assumed to be split over the data axis where a dim holds the microbatch, and over the tensor
    axis unless they have the shape of a stage's input or output. What W needs is included where the plan splits
    backward. Where rematerialisation is yet to be chosen, all stages count as `full`, which stores the least.
    """
    remat = _remat(model)
    traced = model.trace(remat)
    return _stage_memory(model, remat, held_always(model, transformation, traced), traced)


def _remat(model: StagedModel) -> Sequence[str]:
    return ("full",) * model.plan.num_stages if model.remat is None else model.remat


def held_always(
    model: StagedModel, transformation: optax.GradientTransformation, traced: Sequence[TracedStage]
) -> list[HeldAlways]:
    """What every stage holds for the whole step."""
    kinds_of_updates(transformation, [stage.owned for stage in model.parameters])  # refuses what no stage can do alone
    optimizer = [state_shapes(transformation, stage) for stage in model.parameters]
    return [
        HeldAlways(
            parameters=device_bytes(owned.all_params.values()),
            hoisted=_hoisted_bytes(stage),
            gradients=_gradient_bytes(stage),
            optimizer=device_bytes(jax.tree.leaves(optimizer[s])),
            inputs=device_bytes(stage.inputs),
            state=device_bytes(owned.own_state.values()) + device_bytes(stage.state),
        )
        for s, (owned, stage) in enumerate(zip(model.parameters, traced, strict=True))
    ]


def _compiled_always(kept: HeldAlways, programs: ProgramsOfStage) -> HeldAlways:
    """The same with the sizes of what compiled programs make."""
    if (prepare := programs.get("prepare")) is not None:
        kept = replace(kept, hoisted=prepare.outputs)
    if (zeros := programs.get("zeros")) is not None:
        kept = replace(kept, gradients=zeros.outputs)
    return kept


def _stage_memory(
    model: StagedModel, remat: Sequence[str], always: Sequence[HeldAlways], traced: Sequence[TracedStage]
) -> list[StageMemory]:
    return [
        replace(memory, always=kept.total)
        for memory, kept in zip(microbatch_memories(traced, remat, model.plan), always, strict=True)
    ]


def microbatch_memories(traced: Sequence[TracedStage], remat: Sequence[str], plan: Plan) -> list[StageMemory]:
    """What stages of the plan store of a microbatch, without what they hold for the whole step."""
    splits = {action.stage for action in plan.actions if action.op is Op.BACKWARD_INPUT}
    found: dict[Hashable, StageMemory] = {}
    memories = []
    for stage, name in zip(traced, remat, strict=True):
        index = stage.spec.index
        # Stages that share a trace store the same.
        key = id(stage.closed), name, index in splits, plan.has_backward(index)
        if key not in found:
            found[key] = (
                _microbatch_memory(stage, name, splits=index in splits)
                if plan.has_backward(index)
                else StageMemory(activation=0, inputs=_inputs_bytes(stage), new_state=device_bytes(stage.state))
            )
        memories.append(found[key])
    return memories


def _microbatch_memory(stage: TracedStage, remat: str, *, splits: bool) -> StageMemory:
    recomputes = stage.recomputes(remat)
    kept_x = [device_bytes([stage.x[i]]) for i in stage.kept_x]
    kept_state = [device_bytes([stage.state[i]]) for i in stage.kept_state]
    residuals = [_split_bytes(stage, v) for v in stage.residual_vars]
    inputs = _inputs_bytes(stage)
    kept_inputs = inputs if recomputes else _inputs_bytes(stage, stage.kept_x)
    activation = sum(kept_inputs) + (device_bytes(stage.state) if recomputes else sum(kept_state) + sum(residuals))
    kept_for_weights = found = crossing = 0
    shapes = shapes_of(stage.hoisted_vars), shapes_of(stage.residual_vars)
    with jax.set_mesh(stage.spec.mesh):
        inside = recomputed_bytes(trace_pullback(stage, *shapes), partial(_split_bytes, stage))
    if splits:
        with jax.set_mesh(stage.spec.mesh):
            parts = trace_split(stage, *shapes)
        gradients = leaf_bytes(shape for shapes in stage.output_gradients for shape in shapes)
        from_forward = [*kept_x, *kept_state, *([] if recomputes else residuals)]
        of_microbatch = [*kept_x, *kept_state, *residuals, *gradients]
        carried = [] if parts.is_whole else parts.carried
        kept_for_weights = sum(of_microbatch[i] for i in carried if i < len(from_forward))
        found = sum(of_microbatch[i] for i in carried if i >= len(from_forward))
        crossing = sum(_split_bytes(stage, v) for v in parts.crossing)
    return StageMemory(
        activation=activation,
        kept_for_weights=kept_for_weights,
        made_for_weights=crossing + found,
        inputs=inputs,
        kept_inputs=kept_inputs,
        input_gradients=tuple(
            device_bytes(boundary.gradients_on(stage.spec.mesh, stage.microbatch_size)) if has_gradient else 0
            for boundary, has_gradient in zip(stage.boundaries_in, stage.spec.gradients_in, strict=True)
        ),
        recomputed=sum(residuals) if recomputes else 0,
        temporaries={Op.BACKWARD: inside, Op.BACKWARD_INPUT: inside} if inside else {},
        found_for_weights=found,
        new_state=device_bytes(stage.state),
    )


def _inputs_bytes(stage: TracedStage, kept: Collection[int] | None = None) -> tuple[int, ...]:
    """Bytes per device of each value that a stage is handed, or of the leaves among all that it keeps."""
    sizes, first = [], 0
    for boundary in stage.boundaries_in:
        places = range(first, first + len(boundary.leaves))
        sizes.append(device_bytes(stage.x[i] for i in places if kept is None or i in kept))
        first = places.stop
    return tuple(sizes)


def shapes_of(values: Iterable[Var]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values)  # type: ignore[attr-defined]


def _gradient_bytes(stage: TracedStage) -> int:
    """Accumulators are float32 or better, with the shardings that parameters have in a step."""
    params = stage.params_in_step
    return device_bytes(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in params)


def _hoisted_bytes(stage: TracedStage) -> int:
    """Assumed to be split like the parameters and state that they are computed from, on average."""
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in (*stage.params, *stage.fixed_state))
    of_device = device_bytes((*stage.params_in_step, *stage.fixed_state_in_step))
    return nbytes(stage.prepared_vars) * of_device // whole if whole else 0


def _split_bytes(stage: TracedStage, value: Var) -> int:
    """Bytes per device of a value whose layout XLA chooses."""
    mesh = stage.spec.mesh.shape
    ends: list[Any] = [*stage.x_vars, *stage.output_vars]
    shape = value.aval.shape  # type: ignore[attr-defined]
    over_data = any(size and size % stage.microbatch_size == 0 for size in shape)
    over_tensor = over_data and shape not in {v.aval.shape for v in ends}
    return nbytes([value]) // ((mesh.get(DATA, 1) if over_data else 1) * (mesh.get(TENSOR, 1) if over_tensor else 1))
