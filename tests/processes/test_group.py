"""Names of groups, and a group of one process."""

import pytest

from meshpipe.processes.group import Group


def test_every_group_has_a_name_of_its_own() -> None:
    names = [Group(processes).name for processes in ([0], [0, 0], [0, 2], [2, 0], range(1000))]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) < 40


def test_groups_of_other_processes_do_not_affect_names() -> None:
    """A process may have created trainers of its own before a shared one."""
    shared = Group([0, 4])
    Group([0])
    following = Group([0, 4])
    assert int(following.name.rpartition("/")[2]) == int(shared.name.rpartition("/")[2]) + 1


def test_a_process_must_have_a_device_in_the_mesh() -> None:
    with pytest.raises(ValueError, match="Got devices of processes 1, 2, in process 0"):
        Group([1, 2])


def test_a_process_alone_needs_no_service() -> None:
    group = Group([0, 0])
    assert group.is_alone
    assert group.gather("times", "1", 1.0) == ["1"]
    assert group.broadcast("loss", "2", 0, 1.0) == "2"
