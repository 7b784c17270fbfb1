"""For user programs without a `Guard`: an exiting process notifies the others, which would otherwise wait for ever."""

import atexit
import contextlib
import json
import os
import sys
import threading
import time

from meshpipe.processes.coordination import check_own_keys, process_count, process_index, set_key, try_get_key
from meshpipe.processes.exit_codes import FAILED
from meshpipe.processes.group import Group
from meshpipe.processes.secret import IntrusionError

POLL_SECONDS = 1.0
END_SECONDS = 300.0
"""How long an exiting process waits for the others."""
_ENDED = "meshpipe/ended"
_UNEVEN = "meshpipe/uneven"
_INTRUDED = "meshpipe/intruded"
_groups: list[Group] = []
_watching = threading.Event()
_guarded = threading.Event()


def leave_to_guard() -> None:
    """Leaves the detection of tampering with keys to a `Guard`."""
    _guarded.set()


def watch_keys() -> None:
    """From now on, ends this process and the others that watch, with a message, when someone outside the run deletes or
    replaces one of its keys. A process that waits for that key would otherwise wait in vain.
    """
    if process_count() > 1 and not _watching.is_set():
        _watching.set()
        threading.Thread(target=_watch, name="uneven exit", daemon=True).start()


def watch(group: Group) -> None:
    """Ends this process with a message when another of the group has exited after fewer steps and evaluations than this
    one has begun; those can then never complete.

    `jax.distributed` makes an exiting process wait for all others, so without this both would hang silently.
    """
    if group.is_alone:
        return
    if not _groups:
        atexit.register(_end)  # runs before the handler that JAX has registered
    _groups.append(group)
    watch_keys()


def _watch() -> None:
    ended: dict[int, dict[str, int]] = {}
    with contextlib.suppress(Exception):  # the coordinator is gone, and JAX ends this process
        while True:
            time.sleep(POLL_SECONDS)
            _check_keys()
            while (text := try_get_key(f"{_ENDED}/{len(ended)}")) is not None:
                process, calls = json.loads(text)
                ended[process] = calls
            for process, calls in ended.items():
                for group in _groups:
                    if calls.get(group.name, group.calls) < group.calls:
                        _leave(process, calls[group.name], group.calls)


def _check_keys() -> None:
    if _guarded.is_set():
        return
    try:
        check_own_keys()
        text = try_get_key(_INTRUDED)
    except IntrusionError as error:
        text = str(error)
        with contextlib.suppress(Exception):  # another process was first
            set_key(_INTRUDED, text)
    if text is not None:
        _stop(text)


def _leave(process: int, done: int, begun: int) -> None:
    text = (
        f"process {process} has ended after {done} steps and evaluations of a trainer, of which process "
        f"{process_index()} has begun {begun}"
    )
    with contextlib.suppress(Exception):  # another process was first
        set_key(_UNEVEN, text)
    _stop(text)


def _end() -> None:
    """Notifies the others of this exit, and waits for them as JAX would, except for those that cannot finish."""
    calls = {group.name: group.calls for group in _groups}
    with contextlib.suppress(Exception):
        number = 0
        while not _try_set(f"{_ENDED}/{number}", json.dumps([process_index(), calls])):
            number += 1
        partners = {process for group in _groups for process in group.processes} - {process_index()}
        ended, deadline = 0, time.monotonic() + END_SECONDS
        while partners and time.monotonic() < deadline:
            text = try_get_key(f"{_ENDED}/{ended}")
            if text is not None:
                ended += 1
                partners.discard(json.loads(text)[0])
            elif (uneven := try_get_key(_UNEVEN)) is not None:
                _stop(uneven)
            else:
                time.sleep(POLL_SECONDS / 4)


def _try_set(key: str, text: str) -> bool:
    if try_get_key(key) is not None:
        return False
    try:
        set_key(key, text)
    except RuntimeError:
        return False
    return True


def _stop(text: str) -> None:
    print(f"meshpipe: process {process_index()} stops because {text}.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if process_count() > 1 and process_index() == 0:
        time.sleep(2 * POLL_SECONDS)  # the others still read from its key-value store
    os._exit(FAILED)
