"""What a step takes on a described machine, by its compiled programs: memory, times, throughput."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optax

from meshpipe.choose.compiled_memory import ProgramsOfStage, programs_of_stages
from meshpipe.choose.memory import RankMemory, predict_memory
from meshpipe.choose.step_time import StepTime, step_time
from meshpipe.compiled.program import CompiledProgram
from meshpipe.compiled.seconds import plan_seconds
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.links import move_seconds
from meshpipe.layers.staged_model import StagedModel
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import Costs, Timeline
from meshpipe.plan.validate import validate
from meshpipe.stage.products_of_step import products_of_step, total_products

ONCE = ("prepare", "zeros", "reduce", "norm", "update", "summary")
"""The programs that run once per step; the others run for every microbatch."""
SHARE_OF_FORWARD = 1 / 3
"""Of a program that does both: backward has two products for each of forward, one for the gradient of each operand."""


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """One step on a described machine."""

    hardware: Hardware
    programs: tuple[CompiledProgram, ...]
    seconds: tuple[float, ...]
    """Of one call of each program."""
    ranks: tuple[RankMemory, ...]
    time: StepTime
    flops: Mapping[str, float]
    """Operations of the model's products in a step by dtype; recomputed ones do not count."""
    num_devices: int
    tokens: int | None
    """Tokens of a batch; None where there are none."""
    examples: int

    @property
    def timeline(self) -> Timeline:
        """When the actions run, in seconds."""
        return self.time.timeline

    @property
    def step_seconds(self) -> float:
        return self.time.seconds

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: the share of the peak that a step's own products reach, 0 to 1."""
        least = sum(amount / self.hardware.rate(dtype) for dtype, amount in self.flops.items())
        return least / self.num_devices / self.step_seconds if self.step_seconds else math.nan

    @property
    def throughput(self) -> float:
        """Tokens per second, or examples where there are no tokens."""
        return (self.tokens or self.examples) / self.step_seconds if self.step_seconds else math.nan

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def refused(self) -> tuple[CompiledProgram, ...]:
        """The programs that the compiler refuses for their size; nothing is known of their times."""
        return tuple(program for program in self.programs if program.is_refused)

    @property
    def missing(self) -> int:
        """Bytes by which the fullest device is too small; 0 if everything fits."""
        return max(0, self.fullest.total - self.hardware.memory_bytes)

    def of_action(self, stage: int, op: Op) -> float:
        """Seconds of an action."""
        times = {(a.stage, a.op): self.timeline.ends[a] - start for a, start in self.timeline.starts.items()}
        return times.get((stage, op), 0.0)


def predict_step(
    model: StagedModel,
    transformation: optax.GradientTransformation,
    programs: Sequence[CompiledProgram],
    hardware: Hardware,
    tokens: int | None = None,
) -> StepPrediction:
    """The prediction for a model whose programs were compiled by `compile_for`, for all of its stages.

    `tokens` is the number of tokens of a batch.
    """
    assert model.traced, "compile_for traces the model"
    validate(model.plan)
    traced = [model.traced[stage] for stage in range(model.plan.num_stages)]
    seconds = tuple(
        plan_seconds(program, hardware, dict(model.stages[program.stage].submesh.shape)) for program in programs
    )
    by_name = {(program.stage, program.name): time for program, time in zip(programs, seconds, strict=True)}
    of_stage = programs_of_stages(programs)
    costs = Costs(
        {(s, op): _action_seconds(op, s, by_name) for s in range(model.plan.num_stages) for op in Op},
        _transfer_seconds(model, hardware),
    )
    (examples,) = {shape.shape[0] for shape in model.microbatches.shapes.values()}
    return StepPrediction(
        hardware=hardware,
        programs=tuple(programs),
        seconds=seconds,
        ranks=tuple(predict_memory(model, transformation, traced, programs)),
        time=step_time(
            model.plan,
            costs,
            [_around(model, rank, of_stage, by_name) for rank in range(model.plan.num_ranks)],
            hardware,
            model.mesh.devices.size // model.plan.num_ranks,
            late=model.late,
        ),
        flops=total_products(products_of_step(model.traced, model.config.num_microbatches).values()),
        num_devices=model.mesh.devices.size,
        tokens=tokens,
        examples=examples,
    )


def _action_seconds(op: Op, stage: int, seconds: Mapping[tuple[int, str], float]) -> float:
    def of(*names: str) -> float:
        return sum(seconds.get((stage, name), 0.0) for name in names)

    both = of("forward_backward")
    match op:
        case Op.FORWARD:
            return of("forward") + SHARE_OF_FORWARD * both
        case Op.BACKWARD:
            return of("recompute", "backward") + (1 - SHARE_OF_FORWARD) * both
        case Op.BACKWARD_INPUT:
            return of("recompute", "backward_input")
        case Op.BACKWARD_WEIGHT:
            return of("backward_weight")


def _transfer_seconds(model: StagedModel, hardware: Hardware) -> float:
    """The longest time of a move between two ranks."""
    ranks, each = model.plan.stage_ranks, model.mesh.devices.size // model.plan.num_ranks
    moves = [
        move_seconds(float(size), abs(ranks[target] - ranks[value.source]) * each, hardware)
        for value, size in model.value_bytes().items()
        for target in value.targets
        if ranks[target] != ranks[value.source]
    ]
    return max(moves, default=0.0)


def _around(
    model: StagedModel, rank: int, programs: Mapping[int, ProgramsOfStage], seconds: Mapping[tuple[int, str], float]
) -> float:
    stages = model.plan.stages_of(rank)
    return sum(seconds[stage, name] for stage in stages for name in programs.get(stage, {}) if name in ONCE)
