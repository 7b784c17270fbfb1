"""How processes say what differs; tests/multiprocess has it with real processes."""

from meshpipe.processes.agreement import agree, differences, report_failure
from meshpipe.processes.group import Group

DESCRIBED = {"version of jax": "0.10.2", "instructions": "#1"}


def test_the_sentence_says_both_values_where_people_can_read_them() -> None:
    other = {"version of jax": "0.0.1", "instructions": "#0"}
    assert differences([DESCRIBED] * 3) == []
    assert differences([DESCRIBED, DESCRIBED, other]) == [
        "process 2 differs in version of jax (0.0.1, not 0.10.2), instructions"
    ]


def test_neighbours_that_process_0_knows_nothing_of_are_compared_with_each_other() -> None:
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
