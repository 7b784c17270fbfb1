"""Descriptions of what differs between processes; tests/multiprocess tests real processes."""

from meshpipe.processes.agreement import agree, differences, report_failure
from meshpipe.processes.group import Group

DESCRIBED = {"version of jax": "0.10.2", "instructions": "#1"}


def test_a_difference_shows_both_values_if_they_are_readable() -> None:
    other = {"version of jax": "0.0.1", "instructions": "#0"}
    assert differences([DESCRIBED] * 3) == []
    assert differences([DESCRIBED, DESCRIBED, other]) == [
        "process 2 differs in version of jax (0.0.1, not 0.10.2), instructions"
    ]


def test_fields_that_process_0_lacks_are_compared_between_the_others() -> None:
    boundary = "values from stage 1 to 2"
    assert differences([{}, {boundary: "#1"}, {boundary: "#2"}]) == [
        "process 2 differs in values from stage 1 to 2 (compared with process 1)"
    ]
    assert differences({4: {boundary: "#1"}, 6: {boundary: "#2"}}) == [
        "process 6 differs in values from stage 1 to 2 (compared with process 4)"
    ]


def test_a_process_alone_agrees_with_itself() -> None:
    group = Group([0])
    with report_failure(group, "model"):
        agree(group, "model", DESCRIBED)
