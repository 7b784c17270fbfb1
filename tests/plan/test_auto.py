"""Plans found for given costs: never worse than the named schedules, and within the memory that there is."""

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.plan.graph import Graph, chain
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules import SCHEDULES, loop, make_plan, takes_stages, zigzag
from meshpipe.plan.search.auto import Profile, auto_plan
from meshpipe.plan.search.greedy import Rule, greedy_orders
from meshpipe.plan.search.local_search import improve, peak_bytes
from meshpipe.plan.simulate import Costs, StageMemory, simulate
from meshpipe.plan.validate import validate
from tests.plan.random_graphs import random_graph

GIB = 2.0**30


def uneven(num_stages: int, stages_per_rank: int, seed: int) -> Profile:
    """Times and bytes that differ from stage to stage, of about a rank's layers on every rank."""
    chance = random.Random(seed)
    times: dict[Op | tuple[int, Op], float] = {}
    memory = []
    for stage in range(num_stages):
        forward, backward_input, weight = (chance.uniform(0.5, 1.5) / stages_per_rank for _ in range(3))
        times[stage, Op.FORWARD] = forward
        times[stage, Op.BACKWARD_INPUT] = backward_input
        times[stage, Op.BACKWARD_WEIGHT] = weight
        times[stage, Op.BACKWARD] = (backward_input + weight) * chance.uniform(0.9, 1.0)
        kept = chance.uniform(0.5, 1.5) * GIB / stages_per_rank
        memory.append(StageMemory(kept, kept * 0.2, kept * chance.uniform(0.1, 0.9), always=GIB / stages_per_rank))
    return Profile(Costs(times, transfer=chance.choice([0.0, 0.1])), memory)


def best_named(num_ranks: int, num_microbatches: int, profiles: dict[int, Profile], limit: float | None) -> float:
    best = float("inf")
    for stages_per_rank, profile in profiles.items():
        for name in SCHEDULES:
            if name != "inference" and takes_stages(name, stages_per_rank):
                plan = make_plan(name, num_ranks, num_microbatches, stages_per_rank)
                timeline = simulate(plan, profile.costs, profile.memory)
                if limit is None or max(timeline.peak_bytes) <= limit:
                    best = min(best, timeline.makespan)
    return best


@settings(max_examples=6)
@given(
    num_ranks=st.integers(1, 4),
    num_microbatches=st.integers(1, 6),
    most_stages=st.integers(1, 2),
    seed=st.integers(0, 1000),
    limit=st.sampled_from([None, 3 * GIB, 4 * GIB, 6 * GIB]),
)
def test_no_named_schedule_that_fits_is_faster(
    num_ranks: int, num_microbatches: int, most_stages: int, seed: int, limit: float | None
) -> None:
    profiles = {stages: uneven(num_ranks * stages, stages, seed) for stages in range(1, most_stages + 1)}
    plan = auto_plan(num_ranks, num_microbatches, profiles, limit)
    profile = profiles[plan.num_stages // num_ranks]
    timeline = simulate(plan, profile.costs, profile.memory)
    assert plan.schedule.startswith("auto")
    assert limit is None or max(timeline.peak_bytes) <= limit * (1 + 1e-6)
    assert timeline.makespan <= best_named(num_ranks, num_microbatches, profiles, limit) * (1 + 1e-6)
    assert plan.peak_activations is not None
    assert all(a <= b for a, b in zip(timeline.peak_activations, plan.peak_activations, strict=True))
    assert Plan.parse(plan.to_text()) == plan


def test_equal_costs_leave_nothing_to_find() -> None:
    profiles = {stages: Profile(Costs.of_parts(stages)) for stages in (1, 2)}
    plan = auto_plan(4, 8, profiles)
    timeline = simulate(plan, Costs.of_parts(2))
    assert timeline.makespan == 3 * 8 + 1.5  # the last rank has to wait for three halves of a forward
    assert timeline.period == 3 * 8


def test_uneven_costs_leave_much_to_find() -> None:
    profiles = {1: Profile(Costs({(1, Op.FORWARD): 1.4, Op.BACKWARD_INPUT: 1.2, Op.BACKWARD_WEIGHT: 0.8}, 0.1))}
    plan = auto_plan(4, 4, profiles)
    assert plan.schedule == "auto"
    assert simulate(plan, profiles[1].costs).makespan < 0.99 * best_named(4, 4, profiles, None)


def test_less_memory_makes_a_slower_plan_and_none_an_error() -> None:
    memory = [StageMemory(GIB, 0.3 * GIB, 0.1 * GIB, always=GIB)] * 4
    profiles = {1: Profile(Costs(), memory)}
    times = []
    for limit in (2 * GIB, 3 * GIB, 4 * GIB, 9 * GIB):
        timeline = simulate(auto_plan(4, 6, profiles, limit), memory=memory)
        assert max(timeline.peak_bytes) <= limit
        times.append(timeline.makespan)
    assert times == sorted(times, reverse=True)
    assert times[0] == 4 * 3 * 6  # one microbatch at a time
    assert times[-1] == 3 * 6 + 3
    message = (
        "Every rank must hold its stages and what they keep of one microbatch: at least 2,147,483,648 bytes on each "
        "device of the fullest rank. Got a memory limit of 2,147,482,648 bytes. Raise it, or use more ranks, smaller "
        "microbatches or rematerialisation."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        auto_plan(4, 6, profiles, 2 * GIB - 1000)


def test_the_same_costs_give_the_same_plan() -> None:
    first, second = (auto_plan(3, 5, {2: uneven(6, 2, seed=1)}, 5 * GIB) for _ in range(2))
    assert first == second


@settings(max_examples=25)
@given(
    num_ranks=st.integers(1, 5),
    num_microbatches=st.integers(1, 9),
    stages_per_rank=st.integers(1, 3),
    seed=st.integers(0, 1000),
    share=st.floats(0.0, 4.0),
    rule=st.builds(Rule, st.sampled_from([0, 3, 9]), st.booleans(), st.sampled_from([0.0, 0.25, 0.5])),
)
def test_greedy_orders_end_in_any_space_for_one_microbatch(
    num_ranks: int, num_microbatches: int, stages_per_rank: int, seed: int, share: float, rule: Rule
) -> None:
    profile = uneven(num_ranks * stages_per_rank, stages_per_rank, seed)
    for ranks in (loop(num_ranks, stages_per_rank), zigzag(num_ranks, stages_per_rank)):
        stages = [[m for m, holder in zip(profile.memory, ranks, strict=True) if holder == r] for r in range(num_ranks)]
        one = [sum(max(m.activation, m.kept_for_weights + m.made_for_weights) for m in held) for held in stages]
        space = [
            (1 + share) * need + max(m.made_for_weights for m in held) for need, held in zip(one, stages, strict=True)
        ]
        orders = greedy_orders(ranks, num_microbatches, profile.costs, profile.memory, space, rule)
        assert orders is not None
        validate(Plan("mine", num_microbatches, ranks, orders))
        for order, most in zip(orders, space, strict=True):
            assert peak_bytes(order, profile.memory) <= most * (1 + 1e-6)


def test_no_greedy_order_without_space_for_one_microbatch() -> None:
    memory = [StageMemory(activation=1.0)] * 4
    assert greedy_orders(loop(2, 2), 3, Costs(), memory, [2.0, 1.9], Rule()) is None


def test_small_changes_make_a_plan_shorter() -> None:
    head = "schedule: one at a time\nmicrobatches: 3\nstage ranks: 0 1\n"
    rows = [" ".join(f"{rank}{op}{m}" for m in range(3) for op in "FIW") for rank in (0, 1)]
    plan = Plan.parse(head + "".join(f"rank {rank}: {row}\n" for rank, row in enumerate(rows)))
    memory = [StageMemory(activation=1.0, kept_for_weights=1.0)] * 2
    better = improve(plan, Costs(), memory, [2.0, 2.0], 500)
    validate(better)
    assert (simulate(plan).makespan, simulate(better).makespan) == (15, 11)
    assert simulate(better).peak_activations == (2, 2)
    assert improve(plan, Costs(), memory, [1.0, 1.0], 500).orders == plan.orders


@settings(max_examples=10)
@given(
    num_ranks=st.integers(1, 4),
    num_microbatches=st.integers(1, 6),
    stages_per_rank=st.integers(1, 2),
    seed=st.integers(0, 1000),
    limit=st.sampled_from([None, 3 * GIB, 6 * GIB]),
)
def test_plans_for_graphs_are_no_slower_than_the_named_ones(
    num_ranks: int, num_microbatches: int, stages_per_rank: int, seed: int, limit: float | None
) -> None:
    num_stages = num_ranks * stages_per_rank
    profile = replace(uneven(num_stages, stages_per_rank, seed), graph=random_graph(num_stages, seed))
    assert profile.graph is not None
    plan = auto_plan(num_ranks, num_microbatches, {stages_per_rank: profile}, limit)
    validate(plan)
    assert plan.graph == profile.graph
    timeline = simulate(plan, profile.costs, profile.memory)
    assert limit is None or max(timeline.peak_bytes) <= limit * (1 + 1e-6)
    assert all(action.op is Op.FORWARD or profile.graph.has_backward(action.stage) for action in plan.actions)
    for name in SCHEDULES:
        if name != "inference" and takes_stages(name, stages_per_rank):
            named = make_plan(name, num_ranks, num_microbatches, stages_per_rank).on(profile.graph)
            other = simulate(named, profile.costs, profile.memory)
            if limit is None or max(other.peak_bytes) <= limit:
                assert timeline.makespan <= other.makespan * (1 + 1e-6)


def test_stages_that_run_no_backward_make_room_for_others() -> None:
    """Two frozen stages of forwards alone: half of the work of the ranks that train."""
    graph = Graph((False, False, True, True), chain(4).values)
    costs = Costs({Op.BACKWARD_WEIGHT: 1.0})
    plan = auto_plan(4, 8, {1: Profile(costs, graph=graph)})
    assert simulate(plan, costs).makespan == 2 + 8 * 3 + 1
