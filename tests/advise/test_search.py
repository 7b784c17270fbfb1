"""The search for layouts, on the work of a small language model and described machines."""

from dataclasses import replace
from math import prod

import pytest

from meshpipe.advise.candidates import Space
from meshpipe.advise.estimate import Estimate, Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.search import Family, search
from meshpipe.advise.stage_needs import StageNeeds, held_by_rank, needs_of
from meshpipe.advise.times import Roofline
from meshpipe.advise.why import why_lost
from meshpipe.advise.work import ModelWork
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.plan.plan import Op
from meshpipe.plan.schedules import make_plan

BATCH = 8
H100 = find_hardware("h100")


def estimator(work: ModelWork, **changes: object) -> Estimator:
    hardware = replace(H100, **changes)
    return Estimator(work, Roofline(work, hardware), hardware, BATCH)


def space(work: ModelWork, num_devices: int, **fixed: object) -> Space:
    return Space(num_devices=num_devices, batch_size=BATCH, num_layers=len(work.layers), fixed=fixed)


def test_a_block_is_counted_as_its_formulas_say(work: ModelWork):
    block = work.layers[1]
    tokens, width, hidden, kv = 32, 32, 64, 16
    products = 2 * tokens * (2 * width * width + 2 * width * kv + 3 * width * hidden)  # projections and SwiGLU
    attention = 4 * tokens * tokens * width
    forward = sum(amount.each for amount in block.programs["none"][Op.FORWARD].operations.values())
    assert forward == products + attention
    assert block.output == tokens * width * 2
    # Megatron-LM's f and g: two all-reduces of the activation each way.
    assert (block.num_reduces, block.reduces_forward) == (2, 2 * block.output)
    assert block.reduces_backward == 2 * block.output
    assert sum(p.nbytes for p in block.parameters) == 4 * (
        2 * width * width + 2 * width * kv + 3 * width * hidden + 2 * width
    )
    assert block.optimizer_bytes == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("data", [1, 2])
def test_a_model_in_bfloat16_holds_its_parameters_and_a_copy_of_half_the_bytes(work: ModelWork, data: int) -> None:
    """Fully sharded, the copy alone is whole on each device."""
    layout = Layout(data=data, sharding="fully-sharded" if data > 1 else "replicated")
    held = [(p.nbytes, p.on_device(data, 1)) for p in work.layers[1].parameters]
    assert len({layer.prepared for layer in work.layers[1:-1]}) == 1
    needs = needs_of(work, range(1, 2), layout, 1.0)
    matrices = sum(p.nbytes for p in work.layers[1].parameters if len(p.shape) > 1)
    assert needs.parameters == pytest.approx(sum(kept for _, kept in held) + matrices / 2, rel=0.01)


def test_every_microbatch_reads_and_writes_the_accumulators(work: ModelWork):
    accumulators = sum(2 * 4 * prod(p.shape) for p in work.parameters)
    by_arithmetic = estimator(work, flops={"bfloat16": 1e30, "float32": 1e30}, memory_bandwidth=1.0, host_latency=0.0)
    seconds = [
        by_arithmetic.estimate(Layout(num_microbatches=count, remat="none")).parts["compute"] for count in (1, 2)
    ]
    weights = sum(layer.programs["none"][op].memory.fixed for layer in work.layers for op in (Op.FORWARD, Op.BACKWARD))
    assert seconds[1] - seconds[0] == pytest.approx((accumulators + weights) / H100.efficiency["memory"], rel=0.01)


@pytest.mark.parametrize("alone", [1.0, 4.0])
def test_no_layout_is_faster_than_its_bound(work: ModelWork, alone: float):
    by_arithmetic = estimator(work, alone=alone, devices_per_host=4)
    layouts = list(space(work, 4, remat="layer").layouts())
    assert len(layouts) > 100
    for layout in layouts:
        if work.why_not_split(layout.data, layout.tensor, is_sharded=layout.is_sharded) is None:
            least, found = by_arithmetic.least_seconds(layout), by_arithmetic.estimate(layout)
            assert found.seconds >= least * (1 - 1e-9), layout
            assert found.memory >= by_arithmetic.least_memory(layout) * (1 - 1e-9), layout


def test_the_search_finds_what_trying_everything_finds(work: ModelWork):
    by_arithmetic = estimator(work)
    possible = [
        layout
        for layout in space(work, 4, remat="none").layouts()
        if work.why_not_split(layout.data, layout.tensor, is_sharded=layout.is_sharded) is None
    ]
    everything = [by_arithmetic.estimate(layout) for layout in possible]
    found = search(space(work, 4, remat="none"), by_arithmetic)
    assert found.fastest[0].seconds == min(estimate.seconds for estimate in everything)
    for name, family in found.families.items():
        of_family = [estimate.seconds for estimate in everything if estimate.layout.family == name]
        if of_family:
            assert family.best is not None
            assert family.best.seconds == min(of_family)
    assert found.simulated < len(everything) * 0.8


def test_what_is_settled_is_kept(work: ModelWork):
    found = search(space(work, 4, pipeline=2, remat="full"), estimator(work))
    assert found.considered
    assert {(e.layout.pipeline, e.layout.remat) for e in found.fastest} == {(2, "full")}


def test_memory_decides_when_it_is_scarce(work: ModelWork):
    roomy = search(space(work, 4, tensor=1, remat="none"), estimator(work))
    needed = roomy.families["data"].least
    assert needed is not None
    scarce = search(space(work, 4, tensor=1, remat="none"), estimator(work, memory_bytes=int(needed[0])))
    family, winner = scarce.families["data"], scarce.fastest[0]
    assert family.best is None
    assert winner.layout.family != "data"
    assert winner.memory <= 0.92 * needed[0]
    assert why_lost(family, winner, 0.92 * needed[0]).startswith("does not fit: data 4, with all parameters")


def test_slow_links_make_tensor_lose_for_its_all_reduces(work: ModelWork):
    slow = estimator(work, host_link=1e7, network_link=1e7)
    found = search(space(work, 4, remat="none"), slow)
    family, winner = found.families["tensor"], found.fastest[0]
    assert "tensor" not in winner.layout.family
    assert family.impossible == "tensor 4 does not divide dim 1 of layers/1/attention/key/kernel, which has 2"
    mixed = found.families["data + tensor"]
    assert "all-reduces of activations over 2 devices" in why_lost(mixed, winner, slow.limit)


def test_a_family_as_fast_as_the_winner_says_so(work: ModelWork):
    found = search(space(work, 4, remat="none"), estimator(work))
    winner: Estimate = found.fastest[0]
    assert why_lost(Family("x", best=winner), winner, 1.0) == "won"
    alike = replace(winner, layout=Layout(data=4), seconds=winner.seconds * 1.005)
    assert why_lost(Family("x", best=alike), winner, 1.0) == "as fast as the winner, within 1%"


def test_the_weight_part_keeps_some_of_what_is_there_and_what_the_input_part_makes() -> None:
    sizes = dict.fromkeys(StageNeeds.__dataclass_fields__, 0.0)
    plan = make_plan("zb-h1", 1, 1)
    for changes, peak in (({}, 10 + 2 + 3), ({"inside_weight": 10.0}, 6 + 10), ({"inside_forward": 9.0}, 10 + 9)):
        needs = StageNeeds(**{**sizes, "activation": 10.0, "crossing": 6.0, "made": 2.0, "inside": 3.0, **changes})
        assert held_by_rank(plan, 0, [needs]).total == peak


def test_what_schedules_need_does_not_depend_on_which_was_estimated_first(work: ModelWork):
    layouts = [Layout(pipeline=2, num_microbatches=4, schedule=schedule) for schedule in ("1f1b", "zb-h1")]
    both, other = estimator(work), estimator(work)
    together = [both.memory(layout)[0] for layout in layouts]
    assert together == [other.memory(layout)[0] for layout in reversed(layouts)][::-1]
    assert len(set(together)) == 2
