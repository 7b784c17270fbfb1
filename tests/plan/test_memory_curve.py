"""What ranks hold, by the simulator and by carrying out the lowered plan: the same for any graph and schedule."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.plan.graph import Graph, Value
from meshpipe.plan.lower import Buffer, Compute, Free, LoweredPlan, Reduce, Transfer, lower
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules import SCHEDULES, forwards_of, make_plan, takes_stages
from meshpipe.plan.simulate import Costs, StageMemory, simulate
from tests.plan.random_graphs import encoder_decoder, random_graph

ONE_UNIT_EACH = Costs(dict.fromkeys(Op, 1.0))


def random_memory(graph: Graph, seed: int) -> list[StageMemory]:
    """Values are kept by the activations of their readers as a whole, or not at all."""
    chance = random.Random(seed)
    sizes = {value: float(chance.randint(1, 50)) for value in graph.values}
    memory = []
    for stage in range(graph.num_stages):
        inputs = tuple(sizes[value] for value in graph.inputs(stage))
        kept = tuple(size * chance.choice([0, 1]) for size in inputs)
        own = chance.randint(1, 50)
        gradients = tuple(size * chance.choice([0, 1]) for size in inputs)
        memory.append(StageMemory(own + sum(kept), inputs=inputs, kept_inputs=kept, input_gradients=gradients))
    return memory


def carried_out(lowered: LoweredPlan, memory: list[StageMemory]) -> list[float]:
    """The most that each rank holds when instructions are handed out in order; an array counts once, as long as a
    buffer or what is stored for backward holds it.
    """
    plan, graph = lowered.plan, lowered.plan.graph
    sizes: dict[str, float] = {}
    for stage in range(plan.num_stages):
        for value, size in zip(graph.inputs(stage), memory[stage].inputs, strict=True):
            sizes[f"{value.source} {value.name}"] = size
    arrays: list[dict[Buffer, dict[str, float]]] = [{} for _ in range(plan.num_ranks)]
    peaks = [0.0] * plan.num_ranks

    def record(rank: int) -> None:
        distinct = {name: size for held in arrays[rank].values() for name, size in held.items()}
        peaks[rank] = max(peaks[rank], sum(distinct.values()))

    def value_of(buffer: Buffer) -> Value:
        values = graph.outputs(buffer.stage) if buffer.kind in ("y", "dy") else graph.inputs(buffer.stage)
        return next(value for value in values if value.name == buffer.name)

    def held_by(buffer: Buffer, compute: Compute) -> dict[str, float]:
        microbatch, stage = buffer.microbatch, compute.action.stage
        if buffer.kind in ("x", "y"):
            key = f"{value_of(buffer).source} {buffer.name}"
            return {f"{key} {microbatch}": sizes[key]}
        if buffer.kind in ("dx", "dy"):
            place = [(v.source, v.name) for v in graph.inputs(stage)].index((value_of(buffer).source, buffer.name))
            return {str(buffer): memory[stage].input_gradients[place]}
        if buffer.kind == "w":
            return {}
        kept = {
            f"{value.source} {value.name} {microbatch}": size
            for value, size in zip(graph.inputs(stage), memory[stage].kept_inputs, strict=True)
            if size
        }
        return {**kept, str(buffer): memory[stage].activation - sum(memory[stage].kept_inputs)}

    for instruction in lowered.instructions:
        match instruction:
            case Compute(rank, _, _, writes):
                arrays[rank] |= {buffer: held_by(buffer, instruction) for buffer in writes}
                record(rank)
            case Transfer(source, target, source_rank, target_rank):
                moved = arrays[source_rank][source]
                arrays[target_rank][target] = dict(zip([*moved], moved.values(), strict=True))
                record(target_rank)
            case Free(rank, buffers):
                for buffer in buffers:
                    del arrays[rank][buffer]
            case Reduce():
                pass
    assert not any(arrays)
    return peaks


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=15)
@given(
    num_ranks=st.integers(1, 4),
    num_microbatches=st.integers(1, 5),
    stages_per_rank=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    late=st.booleans(),
)
def test_the_simulator_holds_what_the_lowered_plan_holds(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int, seed: int, late: bool
) -> None:
    accepted = stages_per_rank if takes_stages(name, stages_per_rank) else None
    plan = make_plan(name, num_ranks, num_microbatches, accepted)
    plan = plan.on(random_graph(plan.num_stages, seed))
    memory = random_memory(plan.graph, seed)
    names = {value.name for value in plan.graph.values if value.name} if late else set()
    timeline = simulate(plan, ONE_UNIT_EACH, memory, names)
    expected = carried_out(lower(plan, late=names), memory)
    if late and plan.num_stages > plan.num_ranks:  # a lower rank may read what a higher one has: it frees that later
        assert all(held >= least - 1e-6 for held, least in zip(timeline.peak_bytes, expected, strict=True))
    else:
        assert timeline.peak_bytes == pytest.approx(expected)
    assert all(timeline.memory_curve(rank)[-1][1] == pytest.approx(0) for rank in range(plan.num_ranks))


def test_a_value_waits_where_it_is_made_or_where_it_is_read() -> None:
    """Every rank of a decoder reads the memory at once with the first, or each when it comes to it."""
    plan = forwards_of(make_plan("1f1b", 4, 3)).on(encoder_decoder())
    memory = [StageMemory(0, inputs=tuple(8.0 if v.name else 1.0 for v in plan.graph.inputs(s))) for s in range(4)]
    assert simulate(plan, ONE_UNIT_EACH, memory).peak_bytes == (1, 10, 17, 26)
    assert simulate(plan, ONE_UNIT_EACH, memory, {"memory"}).peak_bytes == (1, 25, 9, 10)


def test_what_two_stages_of_a_rank_keep_of_one_value_counts_once() -> None:
    graph = Graph((True,) * 3, (Value("memory", 0, (1, 2)), Value("", 1, (2,))))
    text = "schedule: mine\nmicrobatches: 1\nstage ranks: 0 1 1\n"
    plan = Plan.parse(f"{text}rank 0: 0F0 0B0\nrank 1: 1F0 2F0 2B0 1B0\n").on(graph)
    memory = [
        StageMemory(10),
        StageMemory(20 + 8, inputs=(8,), kept_inputs=(8,)),
        StageMemory(30 + 8, inputs=(8, 1), kept_inputs=(8, 0)),
    ]
    assert simulate(plan, ONE_UNIT_EACH, memory).peak_bytes == (18, 20 + 30 + 8 + 1)
