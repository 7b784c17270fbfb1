"""Instructions carried out with every transfer as a meeting: those of all schedules end, mixed-up ones do not."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.plan.lower import Compute, Instruction, Transfer, lower
from meshpipe.plan.plan import Plan, PlanError
from meshpipe.plan.rendezvous import check_lowered, check_orders
from meshpipe.plan.schedules import SCHEDULES, make_plan, takes_stages

Orders = list[list[Instruction]]


def orders_of(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Orders:
    lowered = lower(make_plan(name, num_ranks, num_microbatches, stages_per_rank))
    return [list(lowered.of_rank(rank)) for rank in range(num_ranks)]


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=40)
@given(num_ranks=st.integers(1, 8), num_microbatches=st.integers(1, 32), stages_per_rank=st.integers(1, 4))
def test_no_rank_waits_for_ever(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    accepted = stages_per_rank if takes_stages(name, stages_per_rank) else None
    check_lowered(lower(make_plan(name, num_ranks, num_microbatches, accepted)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_waits_for_ever_at_any_small_size(name: str) -> None:
    for num_ranks, num_microbatches, stages_per_rank in itertools.product(range(1, 9), range(1, 17), range(1, 5)):
        if takes_stages(name, stages_per_rank):
            check_lowered(lower(make_plan(name, num_ranks, num_microbatches, stages_per_rank)))


@pytest.mark.parametrize("ranks_of_a_process", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_processes_of_several_ranks_do_not_wait_for_ever(name: str, ranks_of_a_process: int) -> None:
    lowered = lower(make_plan(name, 8, 8))
    holders = {rank: rank // ranks_of_a_process for rank in range(8)}

    def is_of(instruction: Instruction, process: int) -> bool:
        if isinstance(instruction, Transfer):
            return process in (holders[instruction.source_rank], holders[instruction.target_rank])
        return holders[instruction.rank] == process

    processes = range(8 // ranks_of_a_process)
    check_orders([[i for i in lowered.instructions if is_of(i, process)] for process in processes], holders)


def place_of(order: list[Instruction], text: str) -> int:
    return next(index for index, instruction in enumerate(order) if str(instruction) == text)


def test_two_ranks_that_take_two_transfers_in_different_orders() -> None:
    """What the data itself allows: rank 1 could send its gradient before it takes the second activation."""
    orders = orders_of("1f1b", 2, 2)
    order = orders[1]
    arrives, leaves = place_of(order, "move y0.1 -> x1.1"), place_of(order, "move dx1.0 -> dy0.0")
    assert arrives < leaves
    order.insert(leaves, order.pop(arrives))
    with pytest.raises(PlanError) as error:
        check_orders(orders)
    assert str(error.value) == (
        "No rank may wait for ever in a transfer. Got: rank 0 waits in `move y0.1 -> x1.1` for rank 1; "
        "rank 1 waits in `move dx1.0 -> dy0.0` for rank 0. Put the transfers of any two in the same order in the lists "
        "of both."
    )


def test_any_two_transfers_swapped_in_one_rank_are_found() -> None:
    """Between two ranks every transfer is a meeting of both, so no order but the common one can be right."""
    for rank, name in itertools.product((0, 1), ("gpipe", "1f1b", "zb-h1")):
        places = [i for i, instruction in enumerate(orders_of(name, 2, 3)[rank]) if isinstance(instruction, Transfer)]
        for first, second in itertools.combinations(places, 2):
            orders = orders_of(name, 2, 3)
            order = orders[rank]
            order[first], order[second] = order[second], order[first]
            with pytest.raises(PlanError, match=r"may wait for ever|must have been written before"):
                check_orders(orders)


def test_a_circle_of_three() -> None:
    """Every rank first takes what the one before it only sends after it was served itself."""
    ring = make_plan("looped-bfs", 3, 2, 2)
    orders = [list(lower(ring).of_rank(rank)) for rank in range(3)]
    moves = {str(i): i for i in lower(ring).instructions if isinstance(i, Transfer)}
    around = [moves[f"move y{stage}.0 -> x{stage + 1}.0"] for stage in (0, 1, 2)]
    made = [next(i for i in orders[rank] if isinstance(i, Compute)) for rank in range(3)]
    makes = [Compute(rank, made[rank].action, (), (around[rank].source,)) for rank in range(3)]
    lists: Orders = [[makes[rank], around[rank], around[rank - 1]] for rank in range(3)]
    with pytest.raises(PlanError) as error:
        check_orders(lists)
    assert (
        "rank 0 waits in `move y0.0 -> x1.0` for rank 1; rank 1 waits in `move y1.0 -> x2.0` for rank 2; "
        "rank 2 waits in `move y2.0 -> x3.0` for rank 0."
    ) in str(error.value)


def test_a_transfer_that_only_one_side_takes_part_in() -> None:
    orders = orders_of("inference", 2, 1)
    del orders[1][:]
    with pytest.raises(PlanError, match=r"rank 0 waits in `move y0.0 -> x1.0` for rank 1; rank 1 has come to the end"):
        check_orders(orders)


def test_a_transfer_in_the_list_of_a_third() -> None:
    orders = orders_of("gpipe", 3, 1)
    orders[2].insert(0, orders[0][1])
    with pytest.raises(PlanError, match=r"own two ranks. Got `move y0.0 -> x1.0`, from rank 0 to 1, in list 2"):
        check_orders(orders)


def test_an_action_before_its_input_has_arrived() -> None:
    orders = orders_of("gpipe", 2, 1)
    orders[1][:2] = reversed(orders[1][:2])
    with pytest.raises(PlanError, match=r"Got `1F0: x1.0 -> r1.0` in list 1, without x1.0"):
        check_orders(orders)


def test_a_plan_of_a_file_is_checked_too() -> None:
    text = make_plan("1f1b", 2, 2).to_text().replace("schedule: 1f1b", "schedule: mine")
    check_lowered(lower(Plan.parse(text)))
