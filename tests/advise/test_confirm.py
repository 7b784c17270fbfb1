"""Of the best layouts, those are compiled or run that can still win."""

from dataclasses import replace

import pytest

from meshpipe.advise.advice import Confirmed
from meshpipe.advise.confirm import confirm_best
from meshpipe.advise.estimate import Estimate
from meshpipe.advise.layout import Layout
from meshpipe.phases import Phase, listening


def estimated(seconds: float) -> Estimate:
    layout = Layout(num_microbatches=int(1000 * seconds))
    return Estimate(layout=layout, cuts=(), seconds=seconds, parts={}, bubble=0.0, memory=0.0)


def confirmed(
    estimates: list[float | tuple[float, ...]], factors: dict[float, float], refused: tuple[float, ...] = ()
) -> list[float]:
    """The estimates that were tried, if each is as far off as its factor says; some have alternatives."""
    choices = [[estimated(s) for s in (choice if isinstance(choice, tuple) else (choice,))] for choice in estimates]

    def confirm(estimate: Estimate) -> Confirmed:
        found = replace(estimate, seconds=factors.get(estimate.seconds, 1.0) * estimate.seconds)
        return Confirmed(estimate=found, how="compiled", reason="no" if estimate.seconds in refused else "")

    known = confirm_best("Compiling the best,", choices, confirm)
    return [found.estimate.layout.num_microbatches / 1000 for found in known]


@pytest.mark.parametrize(
    ("factors", "tried"),
    [
        ({}, [1.0, 1.05, 1.1]),  # 1.1 is within a tenth of 1
        ({1.0: 2.0}, [1.0, 1.05, 1.1]),  # then 1.05 is the best, as estimated: 1.5 would need 0.7 of its estimate
        ({1.0: 2.0, 1.05: 2.0, 1.1: 2.0}, [1.0, 1.05, 1.1]),  # all as far off
        ({1.05: 0.5}, [1.0, 1.05, 1.1]),  # estimates can be twice as long: 1.1 could take 0.5
    ],
)
def test_what_cannot_win_is_not_tried(factors: dict[float, float], tried: list[float]) -> None:
    assert confirmed([1.0, 1.05, 1.1, 1.5, 3.0], factors) == tried


def test_two_are_tried_however_far_apart() -> None:
    assert confirmed([1.0, 2.0, 3.0], {}) == [1.0, 2.0]


def test_what_is_refused_rules_nothing_out() -> None:
    assert confirmed([1.0, 1.5, 3.0], {}, refused=(1.0,)) == [1.0, 1.5]


def test_the_alternative_of_what_is_refused_waits_for_its_turn() -> None:
    choices = [(1.0, 1.3, 1.5), 1.1, (1.2, 1.25), 9.0]
    assert confirmed(choices, {}, refused=(1.0, 1.3)) == [1.0, 1.1, 1.2]  # then 1.3 cannot win any more
    assert confirmed(choices, {}, refused=(1.0, 1.1, 1.2)) == [1.0, 1.1, 1.2, 1.25]  # as many as there are choices


def test_it_says_how_long_the_rest_takes_at_most() -> None:
    heard: list[Phase] = []
    with listening(heard.append):
        confirmed([1.0, 1.01, 1.02], {})
    texts = list(map(str, heard))
    assert texts[0] == "Compiling the best, layout 1 of 3"
    assert "Compiling the best, at most 0 s left, layout 2 of 3" in texts
    assert texts[-1].startswith("Compiling the best took")
