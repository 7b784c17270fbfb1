"""Lowered plans for graphs of stages: random ones under every schedule, and the texts of two that models have."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.plan.graph import Graph, Value, chain
from meshpipe.plan.lower import Buffer, Compute, Free, LoweredPlan, Transfer, lower
from meshpipe.plan.plan import Action, Op, Plan, PlanError
from meshpipe.plan.rendezvous import check_lowered
from meshpipe.plan.schedules import SCHEDULES, forwards_of, make_plan, takes_stages
from meshpipe.plan.validate import validate
from tests.plan.random_graphs import encoder_decoder, random_graph, skip

GOLDEN = Path(__file__).parent / "golden" / "programs"
FROZEN_SKIP = Graph((False, False, True, False), skip().values)


def plan_for(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int, seed: int) -> Plan:
    accepted = stages_per_rank if takes_stages(name, stages_per_rank) else None
    plan = make_plan(name, num_ranks, num_microbatches, accepted)
    return plan.on(random_graph(plan.num_stages, seed))


def check_values(lowered: LoweredPlan) -> None:
    """Every value moves once to each rank that reads it, and every reader's gradient once, straight to the source."""
    plan, graph = lowered.plan, lowered.plan.graph
    ranks = plan.stage_ranks
    expected: Counter[tuple[str, int, int, int, int]] = Counter()
    for value in graph.values:
        home = ranks[value.source]
        for microbatch in range(plan.num_microbatches):
            for rank in {ranks[target] for target in value.targets} - {home}:
                expected["x", value.source, microbatch, home, rank] += 1
            for target in value.targets:
                if graph.has_gradient(value) and not plan.forward_only and ranks[target] != home:
                    expected["dy", value.source, microbatch, ranks[target], home] += 1
    moved: Counter[tuple[str, int, int, int, int]] = Counter()
    for transfer in (i for i in lowered.instructions if isinstance(i, Transfer)):
        source = transfer.source.stage if transfer.target.kind == "x" else transfer.target.stage
        ends = (transfer.source_rank, transfer.target_rank)
        moved[transfer.target.kind, source, transfer.target.microbatch, *ends] += 1
        assert transfer.source.name == transfer.target.name
    assert moved == expected


def check_computes(lowered: LoweredPlan) -> None:
    """Every action reads all its inputs and gradients, and makes all its outputs, in the order of the graph."""
    plan, graph = lowered.plan, lowered.plan.graph
    for compute in (i for i in lowered.instructions if isinstance(i, Compute)):
        stage, op = compute.action.stage, compute.action.op
        read, made = ([(b.kind, b.name) for b in buffers] for buffers in (compute.reads, compute.writes))
        kept = [("r", "")] if plan.has_backward(stage) else []
        if op is Op.FORWARD:
            assert [name for _, name in read] == [value.name for value in graph.inputs(stage)]
            assert made[: len(kept)] == kept
            assert [name for _, name in made[len(kept) :]] == [value.name for value in graph.outputs(stage)]
        elif op is not Op.BACKWARD_WEIGHT:
            assert graph.has_backward(stage)
            assert read[0] == ("r", "")
            readers = [
                (value.name, reader if value.name else None)
                for value in graph.outputs(stage)
                for reader in value.targets
            ]
            assert [(buffer.name, buffer.reader) for buffer in compute.reads[1:]] == readers
            gradients = [value.name for value in graph.inputs(stage) if graph.has_gradient(value)]
            assert [name for kind, name in made if kind != "w"] == gradients


def carry_out(lowered: LoweredPlan) -> None:
    """Follows the instructions with sets of names: what is read is there, written once, and freed once in the end."""
    held: list[set[Buffer]] = [set() for _ in range(lowered.plan.num_ranks)]
    ever: list[set[Buffer]] = [set() for _ in range(lowered.plan.num_ranks)]

    def write(rank: int, buffers: tuple[Buffer, ...]) -> None:
        assert ever[rank].isdisjoint(buffers)
        assert len(set(buffers)) == len(buffers)
        held[rank].update(buffers)
        ever[rank].update(buffers)

    for instruction in lowered.instructions:
        match instruction:
            case Compute(rank, _, reads, writes):
                assert held[rank].issuperset(reads)
                write(rank, writes)
            case Transfer(source, target, source_rank, target_rank):
                assert source_rank != target_rank
                assert source in held[source_rank]
                write(target_rank, (target,))
            case Free(rank, buffers):
                assert held[rank].issuperset(buffers)
                held[rank].difference_update(buffers)
    assert not any(held)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=20)
@given(
    num_ranks=st.integers(1, 5),
    num_microbatches=st.integers(1, 6),
    stages_per_rank=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    late=st.sampled_from(["none", "some", "all"]),
)
def test_programs_of_random_graphs(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int, seed: int, late: str
) -> None:
    plan = plan_for(name, num_ranks, num_microbatches, stages_per_rank, seed)
    validate(plan)
    assert Plan.parse(plan.to_text()) == plan
    names = [value.name for value in plan.graph.values if value.name]
    lowered = lower(plan, late={"none": [], "some": names[::2], "all": names}[late])
    carry_out(lowered)
    check_values(lowered)
    check_computes(lowered)
    check_lowered(lowered)
    for rank, order in enumerate(plan.orders):
        assert [i.action for i in lowered.of_rank(rank) if isinstance(i, Compute)] == list(order)
        assert all(live >= 0 for live in plan.live_activations(rank))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_chain_is_one_graph_of_many(name: str) -> None:
    plan = make_plan(name, 2, 4)
    assert plan.on(chain(plan.num_stages)) == plan
    assert "values" not in plan.to_text()


@pytest.mark.parametrize(
    ("file", "plan", "late"),
    [
        ("skip.txt", make_plan("1f1b", 4, 2).on(skip()), ()),
        ("skip_late.txt", make_plan("1f1b", 4, 2).on(skip()), ("early",)),
        ("skip_frozen.txt", make_plan("zb-h1", 4, 2).on(FROZEN_SKIP), ()),
        ("encoder_decoder.txt", make_plan("1f1b", 4, 2).on(encoder_decoder()), ()),
        ("encoder_decoder_2x2.txt", make_plan("zb-v", 2, 2).on(encoder_decoder()), ()),
    ],
    ids=str,
)
def test_programs_print_as_written(file: str, plan: Plan, late: tuple[str, ...]) -> None:
    text = f"{plan.to_text()}\n{lower(plan, late=late).to_text()}"
    assert text == (GOLDEN / file).read_text()


def test_stages_before_what_is_trained_run_forwards_alone() -> None:
    plan = make_plan("zb-h1", 3, 2).on(Graph((False, True, False), chain(3).values))
    assert [" ".join(map(str, order)) for order in plan.orders] == [
        "0F0 0F1",
        "1F0 1F1 1I0 1I1 1W0 1W1",
        "2F0 2B0 2F1 2B1",
    ]
    assert plan.live_activations(0) == [0, 0]
    assert plan.fusible_stage == 2
    validate(plan)


def test_a_stage_starts_without_waiting_for_what_it_does_not_read() -> None:
    plan = make_plan("gpipe", 4, 1).on(encoder_decoder())
    towers = Graph((True,) * 4, (Value("", 0, (1,)), Value("first", 1, (3,)), Value("", 2, (3,))))
    starts = {str(action): start for action, start in make_plan("gpipe", 4, 1).on(towers).start_times().items()}
    assert starts == {"0F0": 0, "1F0": 1, "2F0": 0, "3F0": 2, "3B0": 3, "2B0": 4, "1B0": 4, "0B0": 5}
    assert plan.dependencies(Action.parse("3F0")) == (Action.parse("1F0"), Action.parse("2F0"))
    assert plan.dependencies(Action.parse("1B0")) == tuple(map(Action.parse, ("1F0", "2B0", "3B0")))


def test_forwards_of_a_graph_keep_its_values() -> None:
    plan = forwards_of(make_plan("1f1b", 4, 2).on(skip()))
    moves = [str(i) for i in lower(plan).instructions if isinstance(i, Transfer) and i.source.name]
    assert moves == [f"move y0.{m}:early -> x{stage}.{m}:early" for m in range(2) for stage in (1, 3)]
    assert plan.on(chain(4)).graph == chain(4)


TEXT = """\
schedule: mine
microbatches: 1
stage ranks: 0 1 2
frozen stages: 0
values: 0 -> 1; early 0 -> 2; 1 -> 2
rank 0: 0F0
rank 1: 1F0 1B0
rank 2: 2F0 2B0
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages: 0", "stages: 3", "`frozen stages` of a plan must be stages from 0 to 2. Got '3'."),
        ("stages: 0", "stages: none", "`frozen stages` of a plan must be whole numbers"),
        ("early 0 -> 2", "early 0 2", "e.g. `memory 1 -> 2 3`; one without a name goes to the next stage"),
        ("early 0 -> 2", "0 -> 2", "without a name goes to the next stage alone"),
        ("early 0 -> 2", "early 0 -> 3", "goes from one of the 3 stages to later ones"),
        ("rank 0: 0F0", "rank 0: 0F0 0B0", "has only an F for each microbatch. Got 0F0 0B0 for stage 0"),
        ("rank 1: 1F0 1B0", "rank 1: 1F0", "needs, for each microbatch, an F and either a B"),
    ],
)
def test_texts_of_graphs_that_are_wrong(old: str, new: str, message: str) -> None:
    plan = Plan.parse(TEXT)
    validate(plan)
    assert plan.to_text() == TEXT
    with pytest.raises(PlanError) as caught:
        validate(Plan.parse(TEXT.replace(old, new)))
    assert message in str(caught.value)


def test_a_plan_fits_only_the_graph_that_it_was_made_for() -> None:
    plan = Plan.parse(TEXT)
    assert plan.on(plan.graph) == plan
    with pytest.raises(PlanError, match=r"Got a plan with frozen stages: 0, values: .*for a model with a chain of"):
        plan.on(chain(3))
    with pytest.raises(PlanError, match="Got 2 stages in the graph for a plan of 3"):
        plan.on(chain(2))
