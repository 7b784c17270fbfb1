"""Chooses the rematerialisation of each stage: within a memory limit, what recomputes least."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import jax
import optax

from meshpipe.choose.memory import ONE_UNIT_EACH, held_always, microbatch_memories, shapes_of
from meshpipe.layers.staged_model import StagedModel
from meshpipe.pipeline.config import parse_bytes
from meshpipe.plan.simulate import StageMemory, Timeline, simulate
from meshpipe.stage.backward import trace_backward
from meshpipe.stage.operations import count_operations
from meshpipe.stage.traced import TracedStage

POLICIES = ("dots_saveable", "dots_with_no_batch_dims_saveable", "layer", "nothing_saveable")
"""What is tried besides `none` and `full`. The other policies are these by another name, or save everything."""

MAX_COMBINATIONS = 1000
"""Of a rank's stages; where there are more, all its stages take the same."""


class TooLarge(ValueError):
    """No rematerialisation keeps a rank within the memory limit."""

    def __init__(self, message: str, needed: int, limit: int):
        super().__init__(message)
        self.needed = needed
        """The bytes per device that would be enough."""
        self.limit = limit
        """The bytes per device that there may be."""


@dataclass(frozen=True)
class _Option:
    """What one rematerialisation costs a stage."""

    remat: str
    operations: float
    """Floating-point operations that it recomputes for each microbatch."""
    memory: StageMemory


def settle_remat(model: StagedModel, transformation: optax.GradientTransformation) -> None:
    """Chooses the rematerialisation of the model where its config leaves it open.

    Raises `ValueError` when nothing fits into the memory limit.
    """
    if model.remat is None:
        assert model.config.memory_limit is not None
        model.remat = choose_remat(model, transformation, parse_bytes(model.config.memory_limit))


def choose_remat(
    model: StagedModel, transformation: optax.GradientTransformation, memory_limit: int
) -> tuple[str, ...]:
    """`none`, a policy or `full` for every stage: the combination that recomputes the fewest operations and fits.

    A rank fits if its peak, as `predict_memory` predicts it, is at most `memory_limit` bytes per device; so the limit
    must leave space for the rest of XLA's temporary memory. Operations are counted in the traced programs; nothing is
    compiled or run. Raises `ValueError` when nothing fits, with the smallest limit that would.
    """
    plain = model.trace(("none",) * model.plan.num_stages)
    always = [kept.total for kept in held_always(model, transformation, plain)]
    memory = [
        replace(stage, always=kept)
        for stage, kept in zip(microbatch_memories(plain, ["none"] * len(plain), model.plan), always, strict=True)
    ]
    timeline = simulate(model.plan, ONE_UNIT_EACH, memory, model.late)
    if max(timeline.peak_bytes) <= memory_limit:
        return ("none",) * model.plan.num_stages
    options = _options(model, plain, memory)
    chosen: dict[int, str] = {}
    too_small: list[tuple[int | float, int]] = []
    for rank in range(model.plan.num_ranks):
        stages = model.plan.stages_of(rank)
        least: int | float = math.inf
        for combination in _by_operations([options[stage] for stage in stages]):
            peak = _peak(timeline, rank, dict(zip(stages, combination, strict=True)))
            least = min(least, peak)
            if peak <= memory_limit:
                chosen.update({stage: option.remat for stage, option in zip(stages, combination, strict=True)})
                break
        else:
            too_small.append((least, rank))
    if too_small:
        least, rank = max(too_small)
        raise TooLarge(
            f"Every rank must fit into the memory limit. Rank {rank} needs {math.ceil(least):,} bytes on each device "
            f"with the rematerialisation that keeps least. Got a limit of {memory_limit:,} bytes. Raise it to that, or "
            "use more ranks or smaller microbatches.",
            math.ceil(least),
            memory_limit,
        )
    return tuple(chosen[stage] for stage in range(model.plan.num_stages))


def _options(model: StagedModel, plain: Sequence[TracedStage], memory: Sequence[StageMemory]) -> list[list[_Option]]:
    """The options of every stage that may be worth taking, from the fewest recomputed operations to the most.

    `plain` has the stages without rematerialisation, and `memory` what they store then.
    """
    num_stages = len(plain)
    of_policies = {name: model.trace((name,) * num_stages) for name in POLICIES}
    stored = {
        name: microbatch_memories(stages, [name] * num_stages, model.plan)
        for name, stages in {**of_policies, "full": plain}.items()
    }
    options = []
    for s, (stage, kept) in enumerate(zip(plain, memory, strict=True)):
        found = [_Option("none", 0.0, kept)]
        if not model.plan.has_backward(s):
            options.append(found)
            continue
        backward = _backward_operations(stage)
        for name in stored:
            if name == "full":
                again = float(count_operations(stage.forward(outputs=False, residuals=True)))
            else:
                again = max(0.0, _backward_operations(of_policies[name][s]) - backward)
            found.append(_Option(name, again, replace(stored[name][s], always=kept.always)))
        options.append(_worth_taking(found))
    return options


def _backward_operations(stage: TracedStage) -> float:
    if not stage.spec.has_backward:
        return 0.0
    with jax.set_mesh(stage.spec.mesh):
        backward = trace_backward(stage, shapes_of(stage.hoisted_vars), shapes_of(stage.residual_vars))
    return float(count_operations(backward))


def _worth_taking(options: Sequence[_Option]) -> list[_Option]:
    """The options, in the order of operations, that need less memory in some way than all those before."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda option: option.operations):
        sizes = _sizes(option.memory)
        if all(any(new < old for new, old in zip(sizes, _sizes(other.memory), strict=True)) for other in kept):
            kept.append(option)
    return kept


def _sizes(memory: StageMemory) -> tuple[int | float, ...]:
    """Bytes between forward and backward, during backward, and until the gradients of the weights."""
    return (
        memory.activation,
        memory.activation + memory.recomputed + max(memory.temporaries.values(), default=0.0),
        memory.kept_for_weights + memory.made_for_weights,
    )


def _by_operations(options: Sequence[Sequence[_Option]]) -> Iterator[tuple[_Option, ...]]:
    """Combinations of one option per stage, from the fewest recomputed operations to the most."""
    if math.prod(map(len, options)) > MAX_COMBINATIONS:
        longest = max(map(len, options))
        same = (tuple(of_stage[min(i, len(of_stage) - 1)] for of_stage in options) for i in range(longest))
        yield from same
        return
    yield from sorted(product(*options), key=lambda combination: sum(option.operations for option in combination))


def _peak(timeline: Timeline, rank: int, chosen: dict[int, _Option]) -> int | float:
    memory = [chosen[s].memory if s in chosen else stage for s, stage in enumerate(timeline.memory)]
    return max(held for _, held in replace(timeline, memory=memory).memory_curve(rank))
