"""Checks that ranks which each follow their own list of instructions cannot wait for each other for ever."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from meshpipe.plan.lower import Buffer, Compute, Free, Instruction, LoweredPlan, Transfer
from meshpipe.plan.plan import PlanError


def check_lowered(lowered: LoweredPlan) -> None:
    """Checks a lowered plan before several processes run it, in time linear in its length; see `check_orders`."""
    check_orders([lowered.of_rank(rank) for rank in range(lowered.plan.num_ranks)])


def check_orders(orders: Sequence[Sequence[Instruction]], holders: Mapping[int, int] | None = None) -> None:
    """Simulates lists of instructions, one per party, with every transfer as a rendezvous of its two sides.

    This is the most that a backend can require: like NCCL's sends and receives, a party waits in a transfer until the
    other is in the same one, even if the data would allow another order. What an instruction reads must also have been
    written before. A party is a rank, or a process of several ranks if `holders` gives the party of each rank.

    Raises `PlanError` that names the instructions that wait for each other, or the one whose input is missing.
    """
    holders = {rank: rank for rank in range(len(orders))} if holders is None else holders
    held: list[set[Buffer]] = [set() for _ in orders]
    cursors = [0] * len(orders)
    waiting: dict[Transfer, int] = {}
    ready = list(range(len(orders)))
    while ready:
        party = ready.pop()
        while cursors[party] < len(orders[party]):
            instruction = orders[party][cursors[party]]
            _check_reads(instruction, party, held[party], holders)
            if isinstance(instruction, Transfer):
                ends = {holders[instruction.source_rank], holders[instruction.target_rank]}
                if party not in ends:
                    raise PlanError(
                        "A transfer may only be in the lists of its own two ranks. "
                        f"Got `{instruction}`, from rank {instruction.source_rank} to {instruction.target_rank}, "
                        f"in list {party}."
                    )
                if len(ends) > 1 and waiting.setdefault(instruction, party) == party:
                    break
                held[holders[instruction.target_rank]].add(instruction.target)
                other = waiting.pop(instruction, party)
                if other != party:
                    cursors[other] += 1
                    ready.append(other)
            elif isinstance(instruction, Compute):
                held[party].update(instruction.writes)
            elif isinstance(instruction, Free):
                held[party].difference_update(instruction.buffers)
            cursors[party] += 1
    if waiting:
        raise PlanError(_circle(holders, {party: transfer for transfer, party in waiting.items()}))


def _check_reads(instruction: Instruction, party: int, held: set[Buffer], holders: Mapping[int, int]) -> None:
    reads: tuple[Buffer, ...] = ()
    if isinstance(instruction, Compute):
        reads = instruction.reads
    elif isinstance(instruction, Free):
        reads = instruction.buffers
    elif isinstance(instruction, Transfer) and holders[instruction.source_rank] == party:
        reads = (instruction.source,)
    if not held.issuperset(reads):
        missing = next(buffer for buffer in reads if buffer not in held)
        raise PlanError(
            "What an instruction reads must have been written before. "
            f"Got `{instruction}` in list {party}, without {missing}. "
            f"Move it after what writes {missing}."
        )


def _circle(holders: Mapping[int, int], waits: Mapping[int, Transfer]) -> str:
    """The chain of parties that wait for each other, until it closes, or reaches a party that has ended."""

    def other_end(party: int) -> int:
        ends = (holders[waits[party].source_rank], holders[waits[party].target_rank])
        return ends[1] if ends[0] == party else ends[0]

    path = [min(waits)]
    while path.count(path[-1]) < 2 and path[-1] in waits:
        path.append(other_end(path[-1]))
    circle = path[path.index(path[-1]) :] if path[-1] in waits else path[-2:]
    links = [f"{party} waits in `{waits[party]}` for {other}" for party, other in pairwise(circle)]
    if path[-1] not in waits:
        links.append(f"{path[-1]} has come to the end of its list")
    kind = "rank" if all(rank == holder for rank, holder in holders.items()) else "process"
    text = "; ".join(f"{kind} {link.replace(' for ', f' for {kind} ')}" for link in links)
    return (
        f"No {kind} may wait for ever in a transfer. Got: {text}. "
        "Put the transfers of any two in the same order in the lists of both."
    )
