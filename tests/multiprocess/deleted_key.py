"""Somebody deletes a key that process 1 has written before process 0 reads it; nothing but the library runs."""

from member import member

from meshpipe.processes import coordination
from meshpipe.processes.group import Group
from meshpipe.processes.uneven_exit import watch_keys

HOURS = 3600.0


def main() -> None:
    flags = member()
    watch_keys()
    group = Group(range(2))
    if flags.process_id == 1:
        group.broadcast("last stage", "2.5", 1, HOURS)
        key = f"meshpipe/{group.name}/last stage/0"
        coordination._client().key_value_delete(coordination._name(key))  # as an outsider would
    group.gather("turn", "", HOURS)
    if flags.process_id == 0:
        print("heard", group.broadcast("last stage", None, 1, HOURS), flush=True)
    group.gather("end", "", HOURS)


if __name__ == "__main__":
    main()
